"""What PPO and DQN descend, compiled by numba: a policy's terms, PPO's loss, a TD loss.

The equations are those of `lit_rl.models.heads`, `lit_rl.losses` and `lit_rl.algorithms.window_loss`; written
as tensor operations, some forty small ones an update cost as much as the products of a small network.

Arrays: logits, log_p, mean, z [N, P]; log_std [P]; out [N, A]; action [N], of a Gaussian [N, P]; all else
[N], but for totals. A name with `grad_` before it is the gradient of what the rest names.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_rl.autograd import first_order
from lit_rl.compiled import Array
from lit_rl.compiled.exp import exp
from lit_rl.compiled.jit import jit_in_order


def compiled_categorical(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy ``[...]`` of logits ``[..., P]`` and actions ``[...]``.

    Not a number where an action is none of the P.
    """
    return _CompiledCategorical.apply(logits, action)


def compiled_ppo_loss(
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
    """Loss, policy loss, value loss, entropy and log ratio of `lit_rl.losses.ppo_loss`."""
    given = (log_prob, value, entropy, old_log_prob, old_value, advantage, target)
    return _CompiledPPOLoss.apply(*given, clip, value_clip, value_coef, entropy_coef)


def compiled_td_loss(
    out: Tensor,
    action: Tensor,
    reward: Tensor,
    discount: Tensor,
    bootstrap: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    is_clipped: bool,
) -> tuple[Tensor, Tensor]:
    """The mean of weighted errors of action values, and the values of the actions taken.

    ``sum_i weight_i f(out_i[action_i] - reward_i - discount_i bootstrap_i) / sum_i counts_i``, f half the
    square, and with `is_clipped` linear from an error of 1 (Huber); not a number where an action is none.

    `out` is ``[..., A, 1]``, `bootstrap` ``[..., 1]``, all else ``[...]``.
    """
    return _CompiledTDLoss.apply(out, action, reward, discount, bootstrap, weight, counts, is_clipped)


def categorical_terms(logits: Array, action: Array) -> tuple[Array, Array, Array]:
    """Log-probabilities of all actions ``[N, P]`` and of those taken, and entropies."""
    log_p = np.empty(logits.shape, logits.dtype)
    log_prob, entropy = np.empty((2, len(action)), logits.dtype)
    _categorical(logits, action, log_p, log_prob, entropy)
    return log_p, log_prob, entropy


def categorical_gradient(
    log_p: Array, action: Array, entropy: Array, grad_log_prob: Array, grad_entropy: Array
) -> Array:
    """That of the logits, from what `categorical_terms` gave."""
    grad_logits = np.empty(log_p.shape, log_p.dtype)
    _categorical_backward(log_p, action, entropy, grad_log_prob, grad_entropy, grad_logits)
    return grad_logits


def gaussian_terms(mean: Array, log_std: Array, action: Array) -> tuple[Array, Array, Array]:
    """``z = (action - mean) / std`` ``[N, P]``, log-densities and entropies of a diagonal Gaussian."""
    z, log_prob, inverse = np.empty(mean.shape, mean.dtype), np.empty(len(mean), mean.dtype), np.exp(-log_std)
    log_scale = (log_std + 0.5 * math.log(2 * math.pi)).sum(dtype=float)
    _gaussian(mean, inverse, log_scale, action, z, log_prob)
    return z, log_prob, np.full(len(mean), log_scale + 0.5 * len(log_std), mean.dtype)


def gaussian_gradients(
    z: Array, log_std: Array, grad_log_prob: Array, grad_entropy: Array
) -> tuple[Array, Array]:
    """Those of mean and log_std, from what `gaussian_terms` gave."""
    grad_mean, grad_log_std = np.empty(z.shape, z.dtype), np.full(len(log_std), grad_entropy.sum(dtype=float))
    _gaussian_backward(z, np.exp(-log_std), grad_log_prob, grad_mean, grad_log_std)
    return grad_mean, grad_log_std.astype(z.dtype)


def ppo_loss_and_gradients(
    *terms: Array, clip: float, value_clip: float | None, value_coef: float, entropy_coef: float
) -> tuple[Array, Array, Array, Array]:
    """`lit_rl.losses.ppo_loss` of its seven tensors as arrays, in its order.

    Returns:
        loss, policy loss, value loss and entropy ``[4]``; the log ratio; the gradients of `log_prob` and
        `value`. That of each entropy is ``-entropy_coef / N``.
    """
    log_ratio, grad_log_prob, grad_value = np.empty((3, len(terms[0])), terms[0].dtype)
    totals = np.empty(4, log_ratio.dtype)
    coefficients = (clip, -1.0 if value_clip is None else value_clip, value_coef, entropy_coef)
    _ppo_loss(*terms, log_ratio, grad_log_prob, grad_value, totals, *coefficients)
    return totals, log_ratio, grad_log_prob, grad_value


def td_loss_and_gradient(out: Array, *given: Array, is_clipped: bool) -> tuple[Array, Array, Array]:
    """The loss ``[]`` of `compiled_td_loss`, the values ``[N]`` of the actions taken, the gradient of `out`.

    `given` is action, reward, discount, bootstrap, weight and counts.
    """
    predicted, total = np.empty(len(out), out.dtype), np.empty((), out.dtype)
    grad_out = np.zeros(out.shape, out.dtype)
    _td_loss(out, *given, is_clipped, predicted, grad_out, total)
    return total, predicted, grad_out


class _CompiledCategorical(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        logits_NP, action_N = logits.detach().numpy().reshape(-1, logits.shape[-1]), _flat(action)
        log_p_NP, log_prob, entropy = categorical_terms(logits_NP, action_N)
        terms = _tensor(log_prob, action.shape), _tensor(entropy, action.shape)
        ctx.save_for_backward(torch.from_numpy(log_p_NP), action, terms[1])
        ctx.shape = logits.shape
        return terms

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_log_prob: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None]:
        log_p, action, entropy = ctx.saved_tensors
        rows = (_flat(t) for t in (action, entropy, grad_log_prob, grad_entropy))
        return _tensor(categorical_gradient(log_p.numpy(), *rows), ctx.shape), None


class _CompiledPPOLoss(torch.autograd.Function):
    """Its gradients are worked out in the forward pass, which has all they need at hand."""

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
        given = [_flat(t) for t in (log_prob, value, entropy, old_log_prob, old_value, advantage, target)]
        totals, log_ratio, grad_log_prob, grad_value = ppo_loss_and_gradients(
            *given, clip=clip, value_clip=value_clip, value_coef=value_coef, entropy_coef=entropy_coef
        )
        shape = log_prob.shape
        ctx.save_for_backward(_tensor(grad_log_prob, shape), _tensor(grad_value, shape))
        ctx.entropy_share = entropy_coef / len(log_ratio)
        told = (*(torch.from_numpy(totals[k, ...]) for k in range(4)), _tensor(log_ratio, shape))
        ctx.mark_non_differentiable(*told[1:])
        return told

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_log_prob, grad_value = ctx.saved_tensors
        grad_entropy = (-ctx.entropy_share * grad).expand(grad_value.shape)
        return grad_log_prob * grad, grad_value * grad, grad_entropy, *[None] * 8


class _CompiledTDLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        action: Tensor,
        reward: Tensor,
        discount: Tensor,
        bootstrap: Tensor,
        weight: Tensor,
        counts: Tensor,
        is_clipped: bool,
    ) -> tuple[Tensor, Tensor]:
        out_NA = out.detach().numpy().reshape(-1, out.shape[-2])
        given = [_flat(t) for t in (action, reward, discount, bootstrap, weight, counts)]
        total, predicted, grad_NA = td_loss_and_gradient(out_NA, *given, is_clipped=is_clipped)
        ctx.save_for_backward(_tensor(grad_NA, out.shape))
        told = _tensor(predicted, bootstrap.shape)
        ctx.mark_non_differentiable(told)
        return torch.from_numpy(total), told

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = ctx.saved_tensors
        return grad_out * grad, *[None] * 7


def _flat(tensor: Tensor) -> Array:
    return tensor.detach().numpy().reshape(-1)


def _tensor(array: Array, shape: torch.Size) -> Tensor:
    return torch.from_numpy(array.reshape(shape))


@jit_in_order
def _categorical(logits: Array, action: Array, log_p: Array, log_prob: Array, entropy: Array) -> None:
    zero = logits.dtype.type(0)
    for i in range(logits.shape[0]):
        row, log_p_i = logits[i], log_p[i]
        largest, total, weighted = row[0], zero, zero
        for k in range(row.shape[0]):
            largest = max(largest, row[k])
        for k in range(row.shape[0]):
            total += exp(row[k] - largest)
        log_total = logits.dtype.type(math.log(total))
        for k in range(row.shape[0]):
            log_p_i[k] = row[k] - largest - log_total
            weighted += exp(log_p_i[k]) * log_p_i[k]
        entropy[i] = -weighted
        a = action[i]
        log_prob[i] = log_p_i[a] if 0 <= a < row.shape[0] else logits.dtype.type(math.nan)


@jit_in_order
def _categorical_backward(
    log_p: Array,
    action: Array,
    entropy: Array,
    grad_log_prob: Array,
    grad_entropy: Array,
    grad_logits: Array,
) -> None:
    """``d log p_a / d logit_k = [k = a] - p_k`` and ``d H / d logit_k = -p_k (log p_k + H)``."""
    for i in range(log_p.shape[0]):
        row, grad_i = log_p[i], grad_logits[i]
        for k in range(grad_i.shape[0]):
            grad_i[k] = -exp(row[k]) * (grad_log_prob[i] + (row[k] + entropy[i]) * grad_entropy[i])
        if 0 <= action[i] < row.shape[0]:
            grad_i[action[i]] += grad_log_prob[i]


@jit_in_order
def _gaussian(
    mean: Array, inverse: Array, log_scale: float, action: Array, z: Array, log_prob: Array
) -> None:
    """`inverse` is ``1 / std [P]``; ``log p = -|z|^2 / 2 - log_scale``."""
    for i in range(mean.shape[0]):
        squares = 0.0
        for k in range(mean.shape[1]):
            z[i, k] = (action[i, k] - mean[i, k]) * inverse[k]
            squares += z[i, k] * z[i, k]
        log_prob[i] = -0.5 * squares - log_scale


@jit_in_order
def _gaussian_backward(
    z: Array, inverse: Array, grad_log_prob: Array, grad_mean: Array, grad_log_std: Array
) -> None:
    """``d log p / d mean = z / std`` and ``d log p / d log_std = z^2 - 1``; adds to the last."""
    for i in range(z.shape[0]):
        for k in range(z.shape[1]):
            grad_mean[i, k] = grad_log_prob[i] * z[i, k] * inverse[k]
            # In this order: no gradient stays none, however far out the action.
            grad_log_std[k] += grad_log_prob[i] * z[i, k] * z[i, k] - grad_log_prob[i]


@jit_in_order
def _ppo_loss(
    log_prob: Array,
    value: Array,
    entropy: Array,
    old_log_prob: Array,
    old_value: Array,
    advantage: Array,
    target: Array,
    log_ratio: Array,
    grad_log_prob: Array,
    grad_value: Array,
    totals: Array,
    clip: float,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
) -> None:
    """`totals` are loss, policy loss, value loss, entropy; a negative `value_clip` is none."""
    number = log_prob.dtype.type
    low, high, limit = number(1 - clip), number(1 + clip), number(value_clip)
    zero, n = number(0), log_prob.shape[0]
    share, value_share = number(1 / n), number(value_coef / n)
    gain = squares = entropies = 0.0
    for i in range(n):
        log_ratio[i] = log_prob[i] - old_log_prob[i]
        ratio = number(math.exp(log_ratio[i]))
        product, clipped = ratio * advantage[i], min(max(ratio, low), high) * advantage[i]
        # Where the clipped product is the smaller one, nothing is to be gained.
        gain += clipped if clipped < product else product
        grad_log_prob[i] = zero if clipped < product else -product * share
        error, moved = value[i] - target[i], value[i] - old_value[i]
        square, grad_value[i] = error * error, error * value_share
        if limit >= zero:
            clipped_error = old_value[i] + min(max(moved, -limit), limit) - target[i]
            if abs(moved) > limit and abs(clipped_error) > abs(error):
                square, grad_value[i] = clipped_error * clipped_error, zero
            square += zero * clipped_error  # what is not a number stays so
        squares += square
        entropies += entropy[i]
    policy_loss, value_loss, mean_entropy = -gain / n, 0.5 * squares / n, entropies / n
    totals[0] = policy_loss + value_coef * value_loss - entropy_coef * mean_entropy
    totals[1], totals[2], totals[3] = policy_loss, value_loss, mean_entropy


@jit_in_order
def _td_loss(
    out: Array,
    action: Array,
    reward: Array,
    discount: Array,
    bootstrap: Array,
    weight: Array,
    counts: Array,
    is_clipped: bool,
    predicted: Array,
    grad_out: Array,
    total: Array,
) -> None:
    """`grad_out` holds zeros."""
    number = out.dtype.type
    half, one = number(0.5), number(1)
    added, counted = 0.0, 0
    for i in range(out.shape[0]):
        counted += counts[i]
    for i in range(out.shape[0]):
        a = action[i]
        predicted[i] = out[i, a] if 0 <= a < out.shape[1] else number(math.nan)
        error = predicted[i] - (reward[i] + discount[i] * bootstrap[i])
        slope, cost = error, half * error * error
        if is_clipped and abs(error) > one:
            slope, cost = math.copysign(one, error), abs(error) - half
        added += weight[i] * cost
        if 0 <= a < out.shape[1]:
            grad_out[i, a] = weight[i] * slope / number(counted)
    total[()] = added / counted
