"""The selective scan compiled by numba: float32 and float64 on the CPU, on one core.

The same equations as in `torch_scan`, one row and a chunk of steps at a time, so that their numbers stay in
the cache. States are independent of each other, so a few go through all steps of the chunk before the next
ones do: four, in the backward pass two, because they share what they read, and then one by one what is left
over. The loop over channels is innermost and becomes vector instructions. Of the states only those at chunk
borders are kept for the backward pass; a chunk's others are computed again. numba compiles on first use (some
seconds a dtype) and keeps the result beside this file or in the user's cache.

Arrays: u, dt, y [B, T, E]; A [N, E], times log2 e, so that exp(dt A) is a power of two; B, C [B, T, N]; h
[B, N, E], first its value before the first step, last that after the last; is_init [B, T]; marks
[B, (T - 1) / CHUNK, N, E]; x [CHUNK, E], dt u of a chunk; a name with `grad_` before it is the gradient of
what the rest names. Parts end in what they are of: _t a step, _n a state, _0 to _3 neighbouring states, _e a
channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_rl.autograd import first_order
from lit_rl.compiled import Array, arrays
from lit_rl.compiled.exp import exp2
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
        A_NE = A_EN.t() * math.log2(math.e)
        inputs = [t.contiguous() for t in (u_BTE, dt_BTE, A_NE, B_BTN, C_BTN, is_init_BT)]
        first_BNE = h_BEN.transpose(1, 2).contiguous()
        h_BNE = torch.empty_like(first_BNE)
        y_BTE = inputs[0].new_empty(u_BTE.shape)
        B, T, E = u_BTE.shape
        marks = h_BNE.new_empty(B, max(T - 1, 0) // CHUNK if is_learning else 0, *h_BNE.shape[1:])
        _forward(*arrays(*inputs, first_BNE, h_BNE, y_BTE, marks, h_BNE.new_empty(CHUNK, E)))
        ctx.save_for_backward(*inputs, first_BNE if is_learning else None, marks)
        ctx.set_materialize_grads(False)
        return y_BTE, h_BNE.transpose(1, 2)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y_BTE: Tensor | None, grad_h_BEN: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, is_init, first, marks = ctx.saved_tensors
        grad_y_BTE = torch.zeros_like(u) if grad_y_BTE is None else grad_y_BTE.contiguous()
        grad_last = first[:0] if grad_h_BEN is None else grad_h_BEN.transpose(1, 2).contiguous()
        wants_first = ctx.needs_input_grad[5]
        grad_h = torch.empty_like(first if wants_first else first[:1])
        grad_u, grad_dt, grad_A, grad_B, grad_C = (torch.zeros_like(t) for t in (u, dt, A, B, C))
        room = [A.new_empty(*shape, u.shape[2]) for shape in ([CHUNK], [CHUNK], [2, CHUNK], [2, CHUNK], [2])]
        _backward(
            *arrays(u, dt, A, B, C, is_init, first, marks, grad_y_BTE, grad_last, grad_h),
            *arrays(grad_u, grad_dt, grad_A, grad_B, grad_C, *room),
        )
        grad_first_BEN = grad_h.transpose(1, 2) if wants_first else None
        return grad_u, grad_dt, grad_A.t(), grad_B, grad_C, grad_first_BEN, None, None


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
    first: Array,
    h: Array,
    y: Array,
    marks: Array,
    x: Array,
) -> None:
    """`h` is left as the last state."""
    rows, steps, channels = u.shape
    states, zero = A.shape[0], u.dtype.type(0)
    for b in range(rows):
        for n in range(states):
            for e in range(channels):
                h[b, n, e] = first[b, n, e]
        for start in range(0, steps, CHUNK):
            stop = min(start + CHUNK, steps)
            if start > 0 and marks.shape[1] > 0:
                for n in range(states):
                    for e in range(channels):
                        marks[b, start // CHUNK - 1, n, e] = h[b, n, e]
            for t in range(start, stop):
                u_t, dt_t, x_t, y_t = u[b, t], dt[b, t], x[t - start], y[b, t]
                for e in range(channels):
                    x_t[e] = dt_t[e] * u_t[e]
                    y_t[e] = zero
            for n in range(0, states - 3, 4):
                h_0, h_1, h_2, h_3 = h[b, n], h[b, n + 1], h[b, n + 2], h[b, n + 3]
                A_0, A_1, A_2, A_3 = A[n], A[n + 1], A[n + 2], A[n + 3]
                for t in range(start, stop):
                    if is_init[b, t]:
                        h[b, n : n + 4] = zero
                    dt_t, x_t, y_t = dt[b, t], x[t - start], y[b, t]
                    B_0, B_1, B_2, B_3 = B[b, t, n], B[b, t, n + 1], B[b, t, n + 2], B[b, t, n + 3]
                    C_0, C_1, C_2, C_3 = C[b, t, n], C[b, t, n + 1], C[b, t, n + 2], C[b, t, n + 3]
                    for e in range(channels):
                        dt_e, x_e = dt_t[e], x_t[e]
                        h_0e = exp2(dt_e * A_0[e]) * h_0[e] + x_e * B_0
                        h_1e = exp2(dt_e * A_1[e]) * h_1[e] + x_e * B_1
                        h_2e = exp2(dt_e * A_2[e]) * h_2[e] + x_e * B_2
                        h_3e = exp2(dt_e * A_3[e]) * h_3[e] + x_e * B_3
                        h_0[e], h_1[e], h_2[e], h_3[e] = h_0e, h_1e, h_2e, h_3e
                        y_t[e] += (h_0e * C_0 + h_1e * C_1) + (h_2e * C_2 + h_3e * C_3)
            for n in range(states - states % 4, states):
                h_n, A_n = h[b, n], A[n]
                for t in range(start, stop):
                    if is_init[b, t]:
                        h_n[:] = zero
                    dt_t, x_t, y_t, B_n, C_n = dt[b, t], x[t - start], y[b, t], B[b, t, n], C[b, t, n]
                    for e in range(channels):
                        h_e = exp2(dt_t[e] * A_n[e]) * h_n[e] + x_t[e] * B_n
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
    first: Array,
    marks: Array,
    grad_y: Array,
    grad_last: Array,
    grad_h: Array,
    grad_u: Array,
    grad_dt: Array,
    grad_A: Array,
    grad_B: Array,
    grad_C: Array,
    x: Array,
    grad_x: Array,
    decay: Array,
    carried: Array,
    h: Array,
) -> None:
    """`grad_last` has no rows where nothing comes from the last state. `grad_h` is left as the gradient of
    the first one if it has all rows, and is room for one row if not.

    Of two states and a chunk's steps `decay` and `carried` [2, CHUNK, E] keep exp(dt_t A) and what it leaves
    of h_{t-1}; `h` [2, E] is the states themselves. The steps of a state lie together: if they alternated,
    LLVM would take the arrays of the two states for overlapping ones, and the loops would not become vectors.
    """
    rows, steps, channels = u.shape
    states, zero, ln_2 = A.shape[0], u.dtype.type(0), u.dtype.type(math.log(2))
    for b in range(rows):
        grad_h_b = grad_h[b] if grad_h.shape[0] == rows else grad_h[0]
        if grad_last.shape[0] == rows:
            grad_h_b[:] = grad_last[b]
        else:
            grad_h_b[:] = zero
        for start in range((steps - 1) // CHUNK * CHUNK, -1, -CHUNK):
            size = min(CHUNK, steps - start)
            entering = marks[b, start // CHUNK - 1] if start > 0 else first[b]
            for k in range(size):
                u_t, dt_t, x_t, grad_x_t = u[b, start + k], dt[b, start + k], x[k], grad_x[k]
                for e in range(channels):
                    x_t[e] = dt_t[e] * u_t[e]
                    grad_x_t[e] = zero
            for n in range(0, states - 1, 2):
                A_0, A_1, h_0, h_1 = A[n], A[n + 1], h[0], h[1]
                h[:] = entering[n : n + 2]
                for k in range(size):
                    t = start + k
                    if is_init[b, t]:
                        h[:] = zero
                    dt_t, x_t, B_0, B_1 = dt[b, t], x[k], B[b, t, n], B[b, t, n + 1]
                    decay_0, decay_1, carried_0, carried_1 = (
                        decay[0, k],
                        decay[1, k],
                        carried[0, k],
                        carried[1, k],
                    )
                    for e in range(channels):
                        dt_e, x_e = dt_t[e], x_t[e]
                        decay_0e, decay_1e = exp2(dt_e * A_0[e]), exp2(dt_e * A_1[e])
                        carried_0e, carried_1e = decay_0e * h_0[e], decay_1e * h_1[e]
                        decay_0[e], decay_1[e] = decay_0e, decay_1e
                        carried_0[e], carried_1[e] = carried_0e, carried_1e
                        h_0[e], h_1[e] = carried_0e + x_e * B_0, carried_1e + x_e * B_1
                grad_h_0, grad_h_1, grad_A_0, grad_A_1 = (
                    grad_h_b[n],
                    grad_h_b[n + 1],
                    grad_A[n],
                    grad_A[n + 1],
                )
                for k in range(size - 1, -1, -1):
                    t = start + k
                    dt_t, x_t, grad_y_t = dt[b, t], x[k], grad_y[b, t]
                    grad_dt_t, grad_x_t = grad_dt[b, t], grad_x[k]
                    decay_0, decay_1, carried_0, carried_1 = (
                        decay[0, k],
                        decay[1, k],
                        carried[0, k],
                        carried[1, k],
                    )
                    B_0, B_1, C_0, C_1 = B[b, t, n], B[b, t, n + 1], C[b, t, n], C[b, t, n + 1]
                    grad_B_0, grad_B_1, grad_C_0, grad_C_1 = zero, zero, zero, zero
                    for e in range(channels):
                        dt_e, x_e, grad_y_e = dt_t[e], x_t[e], grad_y_t[e]
                        g_0, g_1 = grad_h_0[e] + grad_y_e * C_0, grad_h_1[e] + grad_y_e * C_1
                        carried_0e, carried_1e = carried_0[e], carried_1[e]
                        grad_C_0 += (carried_0e + x_e * B_0) * grad_y_e
                        grad_C_1 += (carried_1e + x_e * B_1) * grad_y_e
                        grad_B_0 += g_0 * x_e
                        grad_B_1 += g_1 * x_e
                        grad_x_t[e] += g_0 * B_0 + g_1 * B_1
                        w_0, w_1 = g_0 * carried_0e, g_1 * carried_1e
                        grad_dt_t[e] += w_0 * A_0[e] + w_1 * A_1[e]
                        grad_A_0[e] += w_0 * dt_e
                        grad_A_1[e] += w_1 * dt_e
                        grad_h_0[e], grad_h_1[e] = g_0 * decay_0[e], g_1 * decay_1[e]
                    grad_B[b, t, n], grad_B[b, t, n + 1] = grad_B_0, grad_B_1
                    grad_C[b, t, n], grad_C[b, t, n + 1] = grad_C_0, grad_C_1
                    if is_init[b, t]:
                        grad_h_b[n : n + 2] = zero
            for n in range(states - states % 2, states):
                A_n, h_n = A[n], h[0]
                h_n[:] = entering[n]
                for k in range(size):
                    t = start + k
                    if is_init[b, t]:
                        h_n[:] = zero
                    dt_t, x_t, decay_t, carried_t, B_n = (
                        dt[b, t],
                        x[k],
                        decay[0, k],
                        carried[0, k],
                        B[b, t, n],
                    )
                    for e in range(channels):
                        decay_e = exp2(dt_t[e] * A_n[e])
                        carried_e = decay_e * h_n[e]
                        decay_t[e], carried_t[e] = decay_e, carried_e
                        h_n[e] = carried_e + x_t[e] * B_n
                grad_h_n, grad_A_n = grad_h_b[n], grad_A[n]
                for k in range(size - 1, -1, -1):
                    t = start + k
                    dt_t, x_t, grad_y_t = dt[b, t], x[k], grad_y[b, t]
                    grad_dt_t, grad_x_t = grad_dt[b, t], grad_x[k]
                    decay_t, carried_t, B_n, C_n = decay[0, k], carried[0, k], B[b, t, n], C[b, t, n]
                    grad_B_n, grad_C_n = zero, zero
                    for e in range(channels):
                        g = grad_h_n[e] + grad_y_t[e] * C_n
                        grad_C_n += (carried_t[e] + x_t[e] * B_n) * grad_y_t[e]
                        grad_B_n += g * x_t[e]
                        grad_x_t[e] += g * B_n
                        w = g * carried_t[e]
                        grad_dt_t[e] += w * A_n[e]
                        grad_A_n[e] += w * dt_t[e]
                        grad_h_n[e] = g * decay_t[e]
                    grad_B[b, t, n], grad_C[b, t, n] = grad_B_n, grad_C_n
                    if is_init[b, t]:
                        grad_h_n[:] = zero
            for k in range(size):
                u_t, dt_t, grad_x_t = u[b, start + k], dt[b, start + k], grad_x[k]
                grad_u_t, grad_dt_t = grad_u[b, start + k], grad_dt[b, start + k]
                for e in range(channels):
                    grad_u_t[e] = dt_t[e] * grad_x_t[e]
                    grad_dt_t[e] = ln_2 * grad_dt_t[e] + u_t[e] * grad_x_t[e]
