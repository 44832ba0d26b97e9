"""Policy-gradient losses: pure functions of tensors, means over every entry they are given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective as a loss (Schulman et al. 2017, arXiv 1707.06347, eq. 7), a scalar."""
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def value_loss(value: Tensor, target: Tensor, old_value: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of the critic, a scalar.

    With `clip`, the value may not move further than `clip` from `old_value` (as in OpenAI's PPO code;
    Andrychowicz et al. 2021, arXiv 2006.05990, appendix B.1): the worse of both errors counts.
    """
    if clip is None:
        return 0.5 * F.mse_loss(value, target)
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.max((value - target).square(), (clipped - target).square()).mean()


def approx_kl(log_ratio: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(old || new), a scalar: ``E[(r - 1) - log r]`` (Schulman 2020)."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def clip_fraction(ratio: Tensor, clip: float) -> Tensor:
    """Share of entries whose ratio lies outside ``[1 - clip, 1 + clip]``, a scalar."""
    return ((ratio - 1).abs() > clip).float().mean()
