"""Running statistics that live in checkpoints and move only when told to."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes (the tensor itself where there is one)."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


class RunningMoments(nn.Module):
    """Mean and variance of everything seen so far, in float64, per feature.

    Moments of a batch are merged exactly (Chan et al. 1979, parallel algorithm), over all ranks.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Merge in a batch ``[..., *shape]``, leading dimensions being samples."""
        samples = batch.double().flatten(0, batch.dim() - self.mean.dim() - 1)
        n = reduce_sum(torch.tensor(float(len(samples)), dtype=torch.float64, device=samples.device))
        batch_mean = reduce_sum(samples.sum(0)) / n
        batch_var = reduce_sum((samples - batch_mean).square().sum(0)) / n
        total = self.count + n
        shift = batch_mean - self.mean
        merged = (self.var * self.count + batch_var * n + shift.square() * self.count * n / total) / total
        self.mean.add_(shift * n / total)
        self.var.copy_(merged)
        self.count.copy_(total)


class ObservationNorm(RunningMoments):
    """``(x - mean) / std``, clipped: the identity (but for the clip) before the first `update`.

    Statistics stand still while a rollout is collected and learnt from, so that both see the same
    features (a ratio of 1 at the first minibatch), and in evaluation.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__(shape)
        self.clip = clip
        self.epsilon = epsilon
        # The float32 form of the moments, which is what the forward pass needs.
        self.register_buffer("center", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def update(self, batch: Tensor) -> None:
        super().update(batch)
        self.center.copy_(self.mean)
        self.scale.copy_((self.var + self.epsilon).rsqrt())

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.center) * self.scale).clamp(-self.clip, self.clip)


class RewardScale(RunningMoments):
    """Divides rewards by the standard deviation of the running discounted return, clipped."""

    def __init__(self, clip: float = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__(())
        self.clip = clip
        self.epsilon = epsilon

    def forward(self, reward: Tensor) -> Tensor:
        std = (self.var + self.epsilon).sqrt().to(reward.dtype)
        return (reward / std).clamp(-self.clip, self.clip)
