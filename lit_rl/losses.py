"""Policy-gradient losses: pure functions of tensors, means over every entry they are given.

`ppo_loss` is what PPO descends. Its gradient is written out, because autograd would keep and visit a dozen
small tensors where one step of the chain rule is enough. `clipped_surrogate` and `value_loss` are its terms:
who changes one of them changes `_PPOLoss.backward` and `lit_rl.compiled.losses` with it.

Shapes: ``...`` is the same for all entries of a loss, n of them in all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rl.autograd import first_order
from lit_rl.compiled import can_be_compiled


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


class PPOLoss(NamedTuple):
    """The loss and, without gradients, what it is made of."""

    loss: Tensor
    """What is descended, a scalar."""
    policy_loss: Tensor
    """`clipped_surrogate`, a scalar."""
    value_loss: Tensor
    """`value_loss`, a scalar."""
    entropy: Tensor
    """The mean, a scalar."""
    log_ratio: Tensor
    """``[...]``"""


def ppo_loss(
    log_prob: Tensor,
    value: Tensor,
    entropy: Tensor,
    *,
    old_log_prob: Tensor,
    old_value: Tensor,
    advantage: Tensor,
    target: Tensor,
    clip: float,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
) -> PPOLoss:
    """``policy_loss + value_coef * value_loss - entropy_coef * entropy``: eq. 9 of Schulman et al. as a loss.

    Args:
        log_prob: ``[...]`` of the actions taken, under the agent as it is; with gradient.
        value: ``[...]`` of the critic as it is; with gradient.
        entropy: ``[...]`` of the policy as it is; with gradient.
        old_log_prob: ``[...]`` under the agent that collected.
        old_value: ``[...]`` of the critic that collected.
        advantage: ``[...]``
        target: ``[...]`` that the value shall reach.
        clip: epsilon of the clipped surrogate.
        value_clip: how far a value may move; None for no limit.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
    """
    tensors = (log_prob, value, entropy, old_log_prob, old_value, advantage, target)
    coefficients = (clip, value_clip, value_coef, entropy_coef)
    is_plain = all(isinstance(number, float | int) for number in coefficients if number is not None)
    is_plain = is_plain and (value_clip is None or value_clip >= 0)
    is_plain = is_plain and all(tensor.shape == log_prob.shape for tensor in tensors)
    if is_plain and log_prob.numel() and can_be_compiled(*tensors):
        from lit_rl.compiled.losses import compiled_ppo_loss

        return PPOLoss(*compiled_ppo_loss(*tensors, *coefficients))
    return PPOLoss(*_PPOLoss.apply(*tensors, *coefficients))


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log_prob: Tensor,
        value: Tensor,
        entropy: Tensor,
        old_log_prob: Tensor,
        old_value: Tensor,
        advantage: Tensor,
        target: Tensor,
        clip: float,
        value_clip: float | None,
        value_coef: float,
        entropy_coef: float,
    ) -> tuple[Tensor, ...]:
        log_ratio = log_prob - old_log_prob
        ratio = log_ratio.exp()
        policy_loss = clipped_surrogate(ratio, advantage, clip)
        critic_loss = value_loss(value, target, old_value, value_clip)
        mean_entropy = entropy.mean()
        loss = policy_loss + value_coef * critic_loss - entropy_coef * mean_entropy
        ctx.save_for_backward(ratio, advantage, value, old_value, target)
        ctx.coefficients = (clip, value_clip, value_coef, entropy_coef)
        ctx.mark_non_differentiable(policy_loss, critic_loss, mean_entropy, log_ratio)
        return loss, policy_loss, critic_loss, mean_entropy, log_ratio

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        ratio, advantage, value, old_value, target = ctx.saved_tensors
        clip, value_clip, value_coef, entropy_coef = ctx.coefficients
        share = grad / ratio.numel()
        # d ratio / d log_prob = ratio; where the clipped product is the smaller one, nothing is to be gained.
        product = ratio * advantage
        is_clipped = ratio.clamp(1 - clip, 1 + clip) * advantage < product
        dlog_prob = (product * -share).masked_fill_(is_clipped, 0)
        error = value - target
        dvalue = error * (value_coef * share)
        if value_clip is not None:
            moved = value - old_value
            clipped_error = old_value + moved.clamp(-value_clip, value_clip) - target
            dvalue.masked_fill_((moved.abs() > value_clip) & (clipped_error.abs() > error.abs()), 0)
        dentropy = (-entropy_coef * share).expand_as(ratio)
        return dlog_prob, dvalue, dentropy, *[None] * 8
