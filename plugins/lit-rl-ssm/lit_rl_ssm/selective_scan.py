"""Mamba's recurrence: a diagonal linear state space whose step, input and output depend on the input.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,        y_t = C_t h_t + D u_t

for each channel e and state n (Gu & Dao 2023, arXiv:2312.00752): A[e, n] is discretised exactly (zero-order
hold), B by Euler's rule, as in the paper's code. A reset at t makes exp(dt_t A) zero there, so that h_t
starts from nothing. The skip D u needs no memory; it is left to the caller.

Three ways lead to the same numbers: `compiled_scan` (numba) on the CPU; `cuda_scan` on mamba_ssm's CUDA
kernel; `torch_scan`, which runs anywhere and takes over what the kernel cannot. None unrolls T steps into the
autograd graph.

Shapes: B rows, T time steps, E channels (mamba's d_inner), N = d_state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lit_rl_ssm.compiled_scan import compiled_scan
from lit_rl_ssm.cuda_scan import cuda_scan
from lit_rl_ssm.kernels import SELECTIVE_SCAN, Function, kernel_for
from lit_rl_ssm.torch_scan import torch_scan

# (u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, h_BEN, is_init_BT) -> (y_BTE, h_BEN)
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.compiler.disable  # tracing would unroll loops over time, and does not know numba
def selective_scan(
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BEN: Tensor,
    is_init_BT: Tensor,
    *,
    scan: Scan,
) -> tuple[Tensor, Tensor]:
    """All steps: ``y [B, T, E]`` without the skip, and the last ``h [B, E, N]``.

    Args:
        u_BTE: input.
        dt_BTE: step size, positive.
        A_EN: continuous decay, negative.
        B_BTN: input map.
        C_BTN: output map.
        h_BEN: state before the first step.
        is_init_BT: bool, true where row b's state is cleared before step t.
        scan: what computes it, see `scan_by`. It is given float32 where these are shorter floats.
    """
    tensors = (u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, h_BEN)
    if u_BTE.dtype.itemsize >= torch.float32.itemsize:
        return scan(*tensors, is_init_BT)
    u32, dt32, A32, B32, C32, h32 = (tensor.float() for tensor in tensors)
    y_BTE, last_BEN = scan(u32, dt32, A32, B32, C32, h32, is_init_BT)
    return y_BTE.to(u_BTE.dtype), last_BEN.to(h_BEN.dtype)


def automatic_scan(
    kernel: Function | None,
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BEN: Tensor,
    is_init_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """The fastest scan that these tensors allow; `kernel` is mamba_ssm's, if there is one."""
    scan: Scan = compiled_scan if u_BTE.is_cpu else partial(cuda_scan, kernel)
    return scan(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, h_BEN, is_init_BT)


# Of each of `kernels.BACKENDS`, given the kernel that it found.
SCANS: dict[str, Callable[[Function | None], Scan]] = {
    "auto": lambda kernel: partial(automatic_scan, kernel),
    "torch": lambda kernel: torch_scan,
    "cuda": lambda kernel: partial(cuda_scan, kernel),
}


def scan_by(backend: str) -> Scan:
    """The scan of a layer built with `backend`; raises what `kernels.kernel_for` raises."""
    kernel = kernel_for(SELECTIVE_SCAN, backend)
    return SCANS[backend](kernel)


@torch.no_grad()
def hidden_attention(
    dt_BTE: Tensor, A_EN: Tensor, B_BTN: Tensor, C_BTN: Tensor, is_init_BT: Tensor
) -> Tensor:
    """Each channel's map from inputs to outputs, ``[B, E, T, T]`` (Ali et al. 2024, arXiv:2403.01590).

    Row t, column s holds ``C_t exp(A (dt_{s+1} + ... + dt_t)) B_s dt_s``, zero for s > t and where a reset
    stands in (s, t]. Times u it is the scan's output from a zero state. No gradient.
    """
    B, T, E = dt_BTE.shape
    map_BETT = dt_BTE.new_zeros(B, E, T, T)
    # What is left at step t of the writes of all steps s up to t. Products of decays, not exponentials of
    # differences of sums: those lose digits in long episodes.
    left_BETN = dt_BTE.new_zeros(B, E, T, A_EN.shape[1])
    for t in range(T):
        past_BEtN = left_BETN[:, :, :t]
        decay_BEN = torch.exp(dt_BTE[:, t, :, None] * A_EN)
        past_BEtN *= decay_BEN.masked_fill(is_init_BT[:, t, None, None], 0)[:, :, None]
        left_BETN[:, :, t] = dt_BTE[:, t, :, None] * B_BTN[:, t, None]
        map_BETT[:, :, t, : t + 1] = (left_BETN[:, :, : t + 1] * C_BTN[:, t, None, None]).sum(dim=-1)
    return map_BETT
