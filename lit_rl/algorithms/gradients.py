"""Between backward and the optimizer: gradients averaged over processes, measured and clipped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lit_rl.models.normalization import reduce_sum, world_size


def average_and_clip(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Averages gradients over all processes and scales them down to a norm of at most `max_norm`.

    All gradients together make one flat tensor, so that there is one reduction and one norm.

    Returns:
        the norm before clipping; where it is not finite, gradients are left as they are.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    if world_size() > 1:
        flat = reduce_sum(flat) / world_size()
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
    norm = flat.norm().item()
    if max_norm < norm < float("inf"):
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm
