"""The selective scan on mamba_ssm's CUDA kernel, which knows neither resets nor states.

`selective_scan_fn` runs from a zero state to the end and returns outputs. What it lacks is put into the
sequence, in steps of its own and in step sizes:

- N steps before the first carry the initial state in: step n writes h[e, n] = dt B u with dt = 2^-60, so that
  exp(dt A) is 1 to the last bit, u = 2^60 h[e, n] and B = 1 at n.
- At a reset K is added to dt and u is scaled by dt / (dt + K), so that dt B u stays as it is while
  exp((dt + K) A) < e^-104 is zero in float32. K = 104 / min|A| over the channel's states, as small as it can
  be: the kernel finds exp(dt A) h_{t-1} by subtraction, and the gradient of A gets that rounding K times.
- N steps after the last, with dt = 0, read the last state out: C = 1 at n. (The kernel can return the last
  state too, but no gradient comes back through that.)

So T + 2N steps run, and autograd does the rest. Checked against the recurrence on the CPU, with a stand-in
of the kernel's signature and meaning; it has not run on a GPU yet.

Shapes: B rows, T time steps, E channels, N = d_state, L = T + 2N steps of the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rl_ssm.kernels import Function, runs_on
from lit_rl_ssm.torch_scan import torch_scan

# e^-104 is below half of the smallest float32 above zero.
LOG_OF_NOTHING = 104.0
# A step size too small to decay anything; a power of two, so that dividing by it is exact.
INSTANT = 2.0**-60


def cuda_scan(
    kernel: Function | None,
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BEN: Tensor,
    is_init_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan.selective_scan`; by `torch_scan` where no kernel takes these tensors."""
    # Acting, T = 1: 2N + 1 steps would be waste.
    if kernel is None or not runs_on(u_BTE) or u_BTE.shape[1] == 1:
        return torch_scan(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, h_BEN, is_init_BT)
    return scan_with(kernel, u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, h_BEN, is_init_BT)


def scan_with(
    kernel: Function,
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BEN: Tensor,
    is_init_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """Resets and states for any `kernel` without them.

    It maps ``u [B, E, L], delta [B, E, L], A [E, N], B [B, N, L], C [B, N, L]`` to ``y [B, E, L]``.
    """
    rows, steps, _ = u_BTE.shape
    d_state = A_EN.shape[1]
    K_E = LOG_OF_NOTHING / A_EN.detach().abs().amin(dim=1)
    longer_BTE = dt_BTE + K_E * is_init_BT[:, :, None]
    # Elsewhere the factor is 1, whatever dt: softplus ends in 0, and 0 / 0 is none.
    scaled_BTE = torch.where(is_init_BT[:, :, None], u_BTE * (dt_BTE / longer_BTE.clamp_min(INSTANT)), u_BTE)

    nothing_BEN = torch.zeros_like(h_BEN)
    each_BNN = torch.eye(d_state, dtype=u_BTE.dtype, device=u_BTE.device).expand(rows, -1, -1)
    nothing_BNN = torch.zeros_like(each_BNN)
    y_BEL = kernel(
        torch.cat([h_BEN / INSTANT, scaled_BTE.transpose(1, 2), nothing_BEN], dim=2),
        torch.cat([nothing_BEN + INSTANT, longer_BTE.transpose(1, 2), nothing_BEN], dim=2),
        A_EN,
        torch.cat([each_BNN, B_BTN.transpose(1, 2), nothing_BNN], dim=2),
        torch.cat([nothing_BNN, C_BTN.transpose(1, 2), each_BNN], dim=2),
    )
    _, y_BET, h_BEN = y_BEL.split([d_state, steps, d_state], dim=2)
    return y_BET.transpose(1, 2), h_BEN
