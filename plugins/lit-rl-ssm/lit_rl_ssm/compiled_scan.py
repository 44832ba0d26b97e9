"""The selective scan compiled by numba: float32 and float64 on the CPU, on one core.

The same equations as in `torch_scan`, one row at a time, so that a step's numbers stay in the cache; the loop
over channels is innermost and becomes vector instructions. Of the states only those at chunk borders are kept
for the backward pass; a chunk's others are computed again. numba compiles on first use (some seconds a dtype)
and keeps the result beside this file or in the user's cache.

Arrays: u, dt, y [B, T, E]; A [N, E]; B, C [B, T, N]; h [B, N, E]; is_init [B, T]; marks [B, T / CHUNK, N, E];
a name with `grad_` before it is the gradient of what the rest names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl.autograd import first_order
from lit_rl.compiled import Array, arrays
from lit_rl.compiled.exp import exp
from lit_rl.compiled.jit import jit, jit_in_order

CHUNK = 16


def compiled_scan(
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BEN: Tensor,
    is_init_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan.selective_scan`; all on the CPU, float32 or float64."""
    tensors = (u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, h_BEN)
    is_learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _CompiledScan.apply(*tensors, is_init_BT, is_learning)


class _CompiledScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_BTE: Tensor,
        dt_BTE: Tensor,
        A_EN: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        h_BEN: Tensor,
        is_init_BT: Tensor,
        is_learning: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = [t.contiguous() for t in (u_BTE, dt_BTE, A_EN.t(), B_BTN, C_BTN, is_init_BT)]
        h_BNE = h_BEN.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        y_BTE = inputs[0].new_empty(u_BTE.shape)
        B, T, E = u_BTE.shape
        marks = h_BNE.new_empty(B, -(-T // CHUNK) if is_learning else 0, *h_BNE.shape[1:])
        _forward(*arrays(*inputs, h_BNE, y_BTE, marks, h_BNE.new_empty(E)))
        ctx.save_for_backward(*inputs, marks)
        ctx.set_materialize_grads(False)
        return y_BTE, h_BNE.transpose(1, 2)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y_BTE: Tensor | None, grad_h_BEN: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, is_init, marks = ctx.saved_tensors
        grad_y_BTE = torch.zeros_like(u) if grad_y_BTE is None else grad_y_BTE.contiguous()
        if grad_h_BEN is None:
            grad_h_BNE = A.new_zeros(len(u), *A.shape)
        else:
            grad_h_BNE = grad_h_BEN.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        grad_u, grad_dt, grad_A, grad_B, grad_C = (torch.zeros_like(t) for t in (u, dt, A, B, C))
        N, E = A.shape
        room = [A.new_empty(CHUNK + 1, N, E), A.new_empty(CHUNK, N, E), A.new_empty(E), A.new_empty(E)]
        _backward(
            *arrays(u, dt, A, B, C, is_init, marks, grad_y_BTE, grad_h_BNE),
            *arrays(grad_u, grad_dt, grad_A, grad_B, grad_C, *room),
        )
        return grad_u, grad_dt, grad_A.t(), grad_B, grad_C, grad_h_BNE.transpose(1, 2), None, None


# "contract" lets a product and a sum become one instruction; order of summation is free only backward, where
# B' and C' are sums over channels.
@jit_in_order
def _forward(
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    is_init: Array,
    h: Array,
    y: Array,
    marks: Array,
    x: Array,
) -> None:
    rows, steps, channels = u.shape
    zero, one = u.dtype.type(0), u.dtype.type(1)
    for b in range(rows):
        for t in range(steps):
            if t % CHUNK == 0 and marks.shape[1] > 0:
                for n in range(A.shape[0]):
                    for e in range(channels):
                        marks[b, t // CHUNK, n, e] = h[b, n, e]
            u_t, dt_t, y_t = u[b, t], dt[b, t], y[b, t]
            keep = zero if is_init[b, t] else one
            for e in range(channels):
                x[e] = dt_t[e] * u_t[e]
                y_t[e] = zero
            for n in range(A.shape[0]):
                h_n, A_n, B_n, C_n = h[b, n], A[n], B[b, t, n], C[b, t, n]
                for e in range(channels):
                    h_e = keep * exp(dt_t[e] * A_n[e]) * h_n[e] + x[e] * B_n
                    h_n[e] = h_e
                    y_t[e] += h_e * C_n


@jit
def _backward(
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    is_init: Array,
    marks: Array,
    grad_y: Array,
    grad_h: Array,
    grad_u: Array,
    grad_dt: Array,
    grad_A: Array,
    grad_B: Array,
    grad_C: Array,
    h: Array,
    decay: Array,
    x: Array,
    g_B: Array,
) -> None:
    """`grad_h` comes as the gradient of the last state and leaves as that of the first."""
    rows, steps, channels = u.shape
    zero, one = u.dtype.type(0), u.dtype.type(1)
    for b in range(rows):
        for chunk in range(marks.shape[1] - 1, -1, -1):
            start = chunk * CHUNK
            size = min(CHUNK, steps - start)
            for n in range(A.shape[0]):
                for e in range(channels):
                    h[0, n, e] = marks[b, chunk, n, e]
            for k in range(size):
                u_t, dt_t = u[b, start + k], dt[b, start + k]
                keep = zero if is_init[b, start + k] else one
                for e in range(channels):
                    x[e] = dt_t[e] * u_t[e]
                for n in range(A.shape[0]):
                    before, after, decay_n, A_n, B_n = (
                        h[k, n],
                        h[k + 1, n],
                        decay[k, n],
                        A[n],
                        B[b, start + k, n],
                    )
                    for e in range(channels):
                        decay_e = keep * exp(dt_t[e] * A_n[e])
                        decay_n[e] = decay_e
                        after[e] = decay_e * before[e] + x[e] * B_n
            for k in range(size - 1, -1, -1):
                t = start + k
                u_t, dt_t, grad_y_t, grad_u_t, grad_dt_t = (
                    u[b, t],
                    dt[b, t],
                    grad_y[b, t],
                    grad_u[b, t],
                    grad_dt[b, t],
                )
                for e in range(channels):
                    x[e] = dt_t[e] * u_t[e]
                    g_B[e] = zero
                for n in range(A.shape[0]):
                    before, after, decay_n, A_n, B_n = h[k, n], h[k + 1, n], decay[k, n], A[n], B[b, t, n]
                    grad_h_n, grad_A_n, C_n = grad_h[b, n], grad_A[n], C[b, t, n]
                    grad_B_n, grad_C_n = zero, zero
                    for e in range(channels):
                        g = grad_h_n[e] + grad_y_t[e] * C_n
                        grad_C_n += after[e] * grad_y_t[e]
                        grad_B_n += g * x[e]
                        g_B[e] += g * B_n
                        g *= decay_n[e]
                        grad_h_n[e] = g
                        w = g * before[e]
                        grad_dt_t[e] += w * A_n[e]
                        grad_A_n[e] += w * dt_t[e]
                    grad_B[b, t, n], grad_C[b, t, n] = grad_B_n, grad_C_n
                for e in range(channels):
                    grad_u_t[e] = dt_t[e] * g_B[e]
                    grad_dt_t[e] += u_t[e] * g_B[e]
