"""Depthwise causal convolution over time, and SiLU, whose taps never reach across a reset.

    y_t = silu(bias + sum_k weight[:, W-1-k] * x_{t-k})        for k = 0 .. W-1,

where x_{t-k} counts as zero if a reset stands in (t-k, t]. Inputs from before the pass come from the state.
On the CPU a compiled loop does it (`compiled_convolution`). Else, W being small (4 in Mamba), it is a sum of
W shifted products, without a loop over time; gradients are written out by hand, which spares autograd's
copies of each shifted product.

Shapes: B rows, T time steps, D channels, W taps, P = W - 1 past inputs, S = P + T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from lit_rl.autograd import first_order
from lit_rl.compiled import can_be_compiled
from lit_rl_ssm.compiled_convolution import compiled_convolution
from lit_rl_ssm.episodes import episode_numbers, may_reset_inside
from lit_rl_ssm.kernels import Function, convolution_by_kernel, convolution_runs_on


def causal_convolution(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor,
    state_BDP: Tensor,
    is_init_BT: Tensor,
    *,
    kernel: Function | None = None,
    compiled: bool = True,
) -> tuple[Tensor, Tensor]:
    """SiLU of the convolution of T steps, and the window after them.

    Args:
        x_BTD: inputs.
        weight_DW: taps, the oldest input's first (``nn.Conv1d``'s ``weight[:, 0]`` with ``groups=D``).
        bias_D: added to every step.
        state_BDP: the W - 1 inputs before the first step, the oldest first.
        is_init_BT: bool, true where the window is emptied before ``x[b, t]`` enters it.
        kernel: `causal_conv1d_fn`, used where it runs; None for tensor operations alone.
        compiled: use the compiled loop where it runs.

    Returns:
        ``y [B, T, D]`` and the next ``state [B, D, W-1]``.
    """
    # Channels last all along: every product below then runs over whole rows of D numbers.
    past_BPD = state_BDP.transpose(1, 2).masked_fill(is_init_BT[:, :1, None], 0)
    window_BSD = torch.cat([past_BPD, x_BTD], dim=1)
    steps, past = x_BTD.shape[1], state_BDP.shape[2]
    use_kernel = kernel is not None and steps > 1 and convolution_runs_on(window_BSD, taps=past + 1)
    compiled = compiled and not use_kernel and can_be_compiled(window_BSD, weight_DW, bias_D)
    if steps == 1 and not compiled:
        y_BD = (window_BSD * weight_DW.t()).sum(dim=1) + bias_D
        return silu(y_BD)[:, None], window_BSD[:, 1:].transpose(1, 2)

    episode_BS = None
    if past > 0 and may_reset_inside(is_init_BT):
        episode_BT = episode_numbers(is_init_BT)
        # A reset at t = 0 has cleared the state already, so what is left of it belongs to the first episode.
        episode_BS = torch.cat([episode_BT[:, :1].expand(-1, past), episode_BT], dim=1)
    if compiled:
        y_BTD = compiled_convolution(window_BSD, weight_DW.t(), bias_D, is_init_BT)
    elif kernel is not None and use_kernel:
        y_BTD = silu(convolution_by_kernel(kernel, window_BSD, weight_DW, bias_D, episode_BS))
    else:
        y_BTD = silu(_convolve(window_BSD, weight_DW, bias_D, episode_BS))
    last_BPD = window_BSD[:, steps:]
    if episode_BS is not None:
        is_last_BP = episode_BS[:, steps:] == episode_BS[:, -1:]
        last_BPD = last_BPD * is_last_BP.to(last_BPD.dtype)[:, :, None]
    return y_BTD, last_BPD.transpose(1, 2)


def _convolve(window_BSD: Tensor, weight_DW: Tensor, bias_D: Tensor, episode_BS: Tensor | None) -> Tensor:
    same = None
    if episode_BS is not None:
        steps = window_BSD.shape[1] - weight_DW.shape[1] + 1
        taps = episode_BS.unfold(1, steps, 1)  # [B, W, T]: the episodes of what each tap sees
        same = (taps[:, :-1] == taps[:, -1:]).to(window_BSD.dtype)[..., None]
    # A strided weight would slow every product down; contiguous rows of D do not.
    y: Tensor = _Convolution.apply(window_BSD, weight_DW.t().contiguous(), bias_D, same)
    return y


class _Convolution(torch.autograd.Function):
    """The sum over taps; `same` ``[B, P, T, 1]`` is 0 where the input of a past tap is of another episode."""

    @staticmethod
    def forward(
        ctx: Any, window_BSD: Tensor, weight_WD: Tensor, bias_D: Tensor, same_BPT1: Tensor | None
    ) -> Tensor:
        past = weight_WD.shape[0] - 1
        steps = window_BSD.shape[1] - past
        y_BTD = torch.addcmul(bias_D, window_BSD[:, past:], weight_WD[past])
        for tap in range(past):
            tapped_BTD = window_BSD[:, tap : tap + steps]
            if same_BPT1 is not None:
                tapped_BTD = tapped_BTD * same_BPT1[:, tap]
            y_BTD.addcmul_(tapped_BTD, weight_WD[tap])
        ctx.save_for_backward(window_BSD, weight_WD, same_BPT1)
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        window_BSD, weight_WD, same_BPT1 = ctx.saved_tensors
        past, steps = weight_WD.shape[0] - 1, dy_BTD.shape[1]
        dwindow_BSD = torch.zeros_like(window_BSD)
        dweight = []
        for tap in range(past + 1):
            dtap_BTD = dy_BTD
            if same_BPT1 is not None and tap < past:
                dtap_BTD = dy_BTD * same_BPT1[:, tap]
            dwindow_BSD[:, tap : tap + steps].addcmul_(dtap_BTD, weight_WD[tap])
            dweight.append((dtap_BTD * window_BSD[:, tap : tap + steps]).sum((0, 1)))
        return dwindow_BSD, torch.stack(dweight), dy_BTD.sum((0, 1)), None
