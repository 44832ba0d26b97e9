"""A linear recurrence with a full transition matrix, and a bound on that matrix.

    h_t = A h_{t-1} + v_t        h_{t-1} counts as zero where a reset stands at t

Nothing here runs in parallel over time: products of full matrices cost more than the loop saves. The loop is
one matrix product a step, forward and backward, in one node of the autograd graph:

    g_t = h'_t + A^T g_{t+1},    v'_t = g_t,    A' = sum_{b,t} g_t h_{t-1}^T        ' for gradients

where g_{t+1} counts as zero at h_t if a reset stands at t + 1.

Shapes: B rows, T time steps, N states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl.autograd import first_order


@torch.compiler.disable  # tracing would unroll the loop over time
def dense_scan(A_NN: Tensor, v_BTN: Tensor, h_BN: Tensor, is_init_BT: Tensor) -> Tensor:
    """Every h_t, ``[B, T, N]``, from the state `h_BN` before the first step."""
    return _DenseScan.apply(A_NN, v_BTN, h_BN, is_init_BT)


class _DenseScan(torch.autograd.Function):
    """Time first inside, so that what a step reads and writes is contiguous."""

    @staticmethod
    def forward(ctx: Any, A_NN: Tensor, v_BTN: Tensor, h_BN: Tensor, is_init_BT: Tensor) -> Tensor:
        h_TBN = torch.empty_like(v_BTN.transpose(0, 1), memory_format=torch.contiguous_format)
        before_TBN = torch.empty_like(h_TBN)
        is_kept_TB1 = ~is_init_BT.t()[:, :, None]
        for v_BN, is_kept_B1, before_BN, after_BN in zip(
            v_BTN.unbind(1), is_kept_TB1, before_TBN, h_TBN, strict=True
        ):
            torch.mul(h_BN, is_kept_B1, out=before_BN)
            h_BN = torch.addmm(v_BN, before_BN, A_NN.t(), out=after_BN)
        ctx.save_for_backward(A_NN, before_TBN, is_kept_TB1)
        return h_TBN.transpose(0, 1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_h_BTN: Tensor) -> tuple[Tensor | None, ...]:
        A_NN, before_TBN, is_kept_TB1 = ctx.saved_tensors
        with torch.autocast(A_NN.device.type, enabled=False):
            g_TBN = grad_h_BTN.transpose(0, 1).clone(memory_format=torch.contiguous_format)
            arriving_BN = torch.zeros_like(g_TBN[0])
            for g_BN, is_kept_B1 in reversed([*zip(g_TBN, is_kept_TB1, strict=True)]):
                g_BN += arriving_BN
                arriving_BN = (g_BN @ A_NN) * is_kept_B1
            grad_A_NN = g_TBN.flatten(0, 1).t() @ before_TBN.flatten(0, 1)
        return grad_A_NN, g_TBN.transpose(0, 1), arriving_BN, None


def norm_bound(A_LNN: Tensor) -> Tensor:
    """Upper bounds on the spectral norms of matrices, ``[L, 1, 1]``; at most N^(1/64) times too large.

    ``||A||^32 = ||(A^T A)^16|| <= ||(A^T A)^16||_F``, by four squarings of ``A^T A``. Before every second one
    its size is taken out, so that no power leaves the range of the float type.
    """
    power_LNN, exponent = A_LNN.mT @ A_LNN, 1 / 2
    bound_L11 = A_LNN.new_ones(())
    for _ in range(2):
        size_L11 = _frobenius(power_LNN)
        bound_L11 = bound_L11 * size_L11**exponent
        power_LNN = power_LNN / size_L11
        for _ in range(2):
            power_LNN, exponent = power_LNN @ power_LNN, exponent / 2
    return bound_L11 * _frobenius(power_LNN) ** exponent


def _frobenius(A_LNN: Tensor) -> Tensor:
    return torch.linalg.vector_norm(A_LNN, dim=(-2, -1), keepdim=True)
