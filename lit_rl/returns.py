"""Returns and advantages: pure functions of tensors. Shapes: N sequences, T steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def generalized_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """GAE(lambda) through episode borders (Schulman et al. 2016, arXiv 1506.02438, eq. 11 and 16).

    A termination stops bootstrapping: the value after it is 0. A truncation does not: `next_value`
    there is the value of the episode's true last observation. Either cuts the sum over deltas.

    Args:
        reward: ``[N, T]``.
        value: of each observation, ``[N, T]``.
        next_value: of the true next observation, ``[N, T]``.
        terminated: bool ``[N, T]``.
        truncated: bool ``[N, T]``.
        gamma: discount.
        gae_lambda: weight between the one-step (0) and the Monte-Carlo (1) advantage.

    Returns:
        advantage and value target (advantage + value), each ``[N, T]``.
    """
    delta = reward + gamma * next_value * ~terminated - value
    carry_on = gamma * gae_lambda * (~(terminated | truncated)).to(delta.dtype)
    advantage = running_sum(delta.flip(1), carry_on.flip(1)).flip(1)
    return advantage, advantage + value


def discounted_return(reward: Tensor, ended: Tensor, carry: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    """Running discounted sum of past rewards, restarted after each episode's end.

    ``R_t = reward_t + gamma * R_{t-1}``, the quantity whose variance scales rewards (Engstrom et al. 2020,
    arXiv 2005.12729, section 3).

    Args:
        reward: ``[N, T]``.
        ended: bool ``[N, T]``, the step that closes an episode.
        carry: ``[N]``, the sum that the former call left.
        gamma: discount.

    Returns:
        the sums ``[N, T]`` and the carry ``[N]`` for the next call.
    """
    weight = gamma * (~ended).to(reward.dtype).roll(1, dims=1)
    weight[:, 0] = 0.0
    with_carry = reward.clone()
    with_carry[:, 0] += gamma * carry
    sums = running_sum(with_carry, weight)
    return sums, sums[:, -1] * ~ended[:, -1]


def running_sum(x: Tensor, weight: Tensor) -> Tensor:
    """``y_t = x_t + weight_t y_{t-1}`` with ``y_{-1} = 0``; all ``[N, T]``.

    By doubling (Hillis & Steele 1986, CACM 29): after k rounds y_t holds what the last 2^k steps add to it,
    and the weights are those over 2^k steps. That is ``log2 T`` operations on all steps instead of T on one.
    """
    y, weight, span = x.clone(), weight.clone(), 1
    while span < x.shape[1]:
        # The products are complete before anything is written: what is read overlaps what is written.
        y[:, span:] += weight[:, span:] * y[:, :-span]
        weight[:, span:] = weight[:, span:] * weight[:, :-span]
        span *= 2
    return y


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """``1 - Var(target - value) / Var(target)``: 1 is a perfect critic, 0 a constant one; NaN if constant."""
    return 1 - (target - value).var() / target.var()


class NStep(NamedTuple):
    """What bootstrapping up to n steps ahead needs: ``reward + discount * value[at]`` is the target."""

    reward: Tensor
    """``[N, L]``, the sum over i < k of ``gamma^i reward_{t+i}``."""
    at: Tensor
    """int64 ``[N, L]``, the step ``t + k`` whose value bootstraps, counted from 0 to T - 1."""
    discount: Tensor
    """``[N, L]``, ``gamma^k``, and 0 where nothing bootstraps."""


def n_step(reward: Tensor, terminated: Tensor, has_action: Tensor, *, n: int, gamma: float) -> NStep:
    """The n-step return (Sutton & Barto 2018, section 7.1) of the first L = T - n steps of a stream.

    The stream runs through episodes. Of a truncated one the true last observation is a step of its own,
    without an action: the return bootstraps from there, k steps ahead with k < n. A termination stops it
    after its reward. Else k = n. A step that has no action itself gets reward 0, discount 0 and k = 0.

    Args:
        reward: ``[N, T]``.
        terminated: bool ``[N, T]``, the step that ends its episode; not looked at where there is no action.
        has_action: bool ``[N, T]``.
        n: steps to look ahead, from 1 to T.
        gamma: discount.

    Raises:
        ValueError: if the stream is shorter than n.
    """
    T = reward.shape[1]
    if not 1 <= n <= T:
        raise ValueError(f"n is {n} for a stream of {T} steps: it must be from 1 to {T}")
    L = T - n
    goes_on = ~terminated
    step_discount = goes_on.to(reward.dtype) * gamma
    going = has_action[:, :L]
    total = reward[:, :L] * going
    at = torch.arange(L, device=reward.device) + going
    discount = step_discount[:, :L] * going
    for i in range(1, n):
        before, here = slice(i - 1, i - 1 + L), slice(i, i + L)
        going = going & goes_on[:, before] & has_action[:, here]
        total = total + reward[:, here] * going * gamma**i
        at = at + going
        discount = torch.where(going, step_discount[:, here] * gamma**i, discount)
    return NStep(total, at, discount)
