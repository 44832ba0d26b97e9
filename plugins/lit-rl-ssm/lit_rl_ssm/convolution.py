"""Depthwise causal convolution over time whose taps never reach across a reset.

    y_t = bias + sum_k weight[:, W-1-k] * x_{t-k}        for k = 0 .. W-1,

where x_{t-k} counts as zero if a reset stands in (t-k, t]. Inputs from before the pass come from the state.
W is small (4 in Mamba), so this is a sum of W shifted products; there is no loop over time.

Shapes: B rows, T time steps, D channels, W taps, P = W - 1 past inputs, S = P + T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rl_ssm.episodes import episode_numbers, may_reset_inside


def causal_convolution(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor, state_BDP: Tensor, is_init_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """The convolution of T steps and the window after them.

    Args:
        x_BTD: inputs.
        weight_DW: taps, the oldest input's first (``nn.Conv1d``'s ``weight[:, 0]`` with ``groups=D``).
        bias_D: added to every step.
        state_BDP: the W - 1 inputs before the first step, the oldest first.
        is_init_BT: bool, true where the window is emptied before ``x[b, t]`` enters it.

    Returns:
        ``y [B, T, D]`` and the next ``state [B, D, W-1]``.
    """
    # Channels last all along: every product below then runs over whole rows of D numbers.
    past_BPD = state_BDP.transpose(1, 2).masked_fill(is_init_BT[:, :1, None], 0)
    window_BSD = torch.cat([past_BPD, x_BTD], dim=1)
    if x_BTD.shape[1] == 1:
        y_BD = (window_BSD * weight_DW.t()).sum(dim=1) + bias_D
        return y_BD[:, None], window_BSD[:, 1:].transpose(1, 2)
    steps, past = x_BTD.shape[1], past_BPD.shape[1]
    has_inner_resets = past > 0 and may_reset_inside(is_init_BT)
    is_same = _same_episode(is_init_BT, past, x_BTD.dtype) if has_inner_resets else None

    y_BTD = torch.addcmul(bias_D, x_BTD, weight_DW[:, -1])
    for tap in range(past):
        tapped_BTD = window_BSD[:, tap : tap + steps]
        if is_same is not None:
            tapped_BTD = tapped_BTD * is_same[tap]
        y_BTD = torch.addcmul(y_BTD, tapped_BTD, weight_DW[:, tap])
    last_BPD = window_BSD[:, steps:]
    if is_same is not None:
        # The input that tap k + 1 saw at the last step is the one that tap k will see next.
        last_BPD = last_BPD * torch.stack([is_same[tap][:, -1] for tap in range(1, past + 1)], dim=1)
    return y_BTD, last_BPD.transpose(1, 2)


def _same_episode(is_init_BT: Tensor, past: int, dtype: torch.dtype) -> list[Tensor]:
    """For each tap ``[B, T, 1]``: 1 where the input it sees belongs to the step's own episode, else 0."""
    episode_BT = episode_numbers(is_init_BT)
    # A reset at t = 0 has cleared the state already, so what is left of it belongs to the first episode.
    episode_BS = torch.cat([episode_BT[:, :1].expand(-1, past), episode_BT], dim=1)
    steps = episode_BT.shape[1]
    taps = [episode_BS[:, tap : tap + steps] == episode_BT for tap in range(past + 1)]
    return [is_same_BT.to(dtype)[:, :, None] for is_same_BT in taps]
