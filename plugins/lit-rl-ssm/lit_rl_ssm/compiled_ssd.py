"""Mamba-2's recurrence by chunks compiled by numba: float32 and float64 on the CPU, on one core.

The same equations as in `ssd`, one row and one chunk at a time, so that a chunk's numbers stay in the cache.
Products of matrices are written as loops: the heads' channels, which share B and C, lie side by side, and the
loop over them is innermost and becomes vector instructions. Kept for the backward pass are the states that
enter chunks and what is read from them; the rest is computed again. A reset sets the decay of its step to 0,
which cuts every path across it.

Arrays: x, y [B, T, E], E = H * P channels; dt and a = dt * A [B, T, H]; B, C [B, T, N]; D [H]; h [B, N, E];
is_init [B, T]; marks [B, ceil(T / L), N, E], the states that enter chunks; outer [B, T, E], what is read from
them. Of one chunk of up to L steps: decay [H, L, L], ``decay[j, t, s] = exp(a_{s+1} + .. + a_t)`` for t >= s;
start [L, H], ``exp(a_1 + .. + a_t)``; CB [L, L], ``C_t . B_s``; written [L, E], what steps leave at its end;
W [L, L] of one head. A name with `grad_` before it is the gradient of what the rest names; one with `_j`
behind it is the part of head j.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl.autograd import first_order
from lit_rl.compiled import Array, arrays
from lit_rl.compiled.exp import exp
from lit_rl.compiled.jit import jit
from lit_rl.compiled.products import add_inner_products, add_product

L = 16


def compiled_ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    is_init_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `ssd.ssd`; all on the CPU, float32 or float64."""
    y_BTE, state_BQN = _CompiledSSD.apply(
        x_BTHP.flatten(2), dt_BTH, dt_BTH * A_H, B_BTN, C_BTN, D_H, state_BHPN.flatten(1, 2), is_init_BT
    )
    return y_BTE.view(x_BTHP.shape), state_BQN.view(state_BHPN.shape)


class _CompiledSSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTE: Tensor,
        dt_BTH: Tensor,
        a_BTH: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        D_H: Tensor,
        state_BEN: Tensor,
        is_init_BT: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = [t.contiguous() for t in (x_BTE, dt_BTH, a_BTH, B_BTN, C_BTN, D_H, is_init_BT)]
        state_BNE = state_BEN.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        (rows, steps, E), H = x_BTE.shape, len(D_H)
        y_BTE, outer_BTE = x_BTE.new_empty(x_BTE.shape), x_BTE.new_empty(x_BTE.shape)
        marks = state_BNE.new_empty(rows, -(-steps // L), *state_BNE.shape[1:])
        shapes = [(H, L, L), (L, H), (L, L), (L, E), (E,), (L, L), (L, E // H), (L, E // H)]
        room = [x_BTE.new_empty(shape) for shape in shapes]
        _forward(*arrays(*inputs, state_BNE, y_BTE, outer_BTE, marks, *room))
        ctx.save_for_backward(*inputs, outer_BTE, marks)
        return y_BTE, state_BNE.transpose(1, 2)  # whoever reads it may copy it: learning does not

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor, grad_state_BEN: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, outer, marks = ctx.saved_tensors
        x, H = inputs[0], len(inputs[5])
        grad_state = grad_state_BEN.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        grads = [torch.zeros_like(t) for t in inputs[:6]]
        E = x.shape[2]
        shapes = [(H, L, L), (L, H), *[(L, L)] * 4, *[(L, E)] * 3, (E,), (E,), *[(L, E // H)] * 3, (L,), (L,)]
        room = [x.new_empty(shape) for shape in shapes]
        _backward(*arrays(*inputs, outer, marks, grad_y.contiguous(), grad_state, *grads, *room))
        return *grads, grad_state.transpose(1, 2), None


@jit
def _carry(state: Array, kept: Array, left: Array, right: Array) -> None:
    """``state = state * kept + left @ right``, few rows of the state at a time, which stay in the cache."""
    for start in range(0, state.shape[0], 8):
        rows = slice(start, start + 8)
        part = state[rows]
        for i in range(part.shape[0]):
            row = part[i]
            for q in range(row.shape[0]):
                row[q] *= kept[q]
        add_product(part, left[rows], right)


@jit
def _prepare(
    x: Array,
    dt: Array,
    a: Array,
    B: Array,
    C: Array,
    is_init: Array,
    decay: Array,
    start: Array,
    CB: Array,
    written: Array,
) -> None:
    """Fill the last four from a chunk's steps."""
    size, heads = a.shape
    headdim = x.shape[1] // heads
    zero, one = a.dtype.type(0), a.dtype.type(1)
    for j in range(heads):
        for t in range(size):
            kept = zero if is_init[t] else exp(a[t, j])
            start[t, j] = kept * start[t - 1, j] if t else kept
            for s in range(t):
                decay[j, t, s] = kept * decay[j, t - 1, s]
            decay[j, t, t] = one
    CB[:size, :size] = zero
    add_inner_products(CB[:size, :size], C, B)
    for s in range(size):
        written_s, x_s = written[s], x[s]
        for j in range(heads):
            left = decay[j, size - 1, s] * dt[s, j]
            for p in range(headdim):
                written_s[j * headdim + p] = left * x_s[j * headdim + p]


@jit
def _forward(
    x: Array,
    dt: Array,
    a: Array,
    B: Array,
    C: Array,
    D: Array,
    is_init: Array,
    h: Array,
    y: Array,
    outer: Array,
    marks: Array,
    decay: Array,
    start: Array,
    CB: Array,
    written: Array,
    kept: Array,
    W: Array,
    x_j: Array,
    y_j: Array,
) -> None:
    rows, steps, channels = x.shape
    heads = D.shape[0]
    headdim = channels // heads
    zero = x.dtype.type(0)
    W[:] = zero
    for b in range(rows):
        for chunk in range(marks.shape[1]):
            lo, hi = chunk * L, min(chunk * L + L, steps)
            size = hi - lo
            now = slice(lo, hi)
            of_chunk = (x[b, now], dt[b, now], a[b, now], B[b, now], C[b, now], is_init[b, now])
            _prepare(*of_chunk, decay, start, CB, written)
            marks[b, chunk] = h[b]
            read = outer[b, now]
            read[:] = zero
            add_product(read, C[b, now], h[b])
            for j in range(heads):
                first = j * headdim
                for t in range(size):
                    read_t, x_t, x_jt, y_jt, f = read[t], x[b, lo + t], x_j[t], y_j[t], start[t, j]
                    for p in range(headdim):
                        read_t[first + p] *= f
                        x_jt[p] = x_t[first + p]
                        y_jt[p] = read_t[first + p] + D[j] * x_jt[p]
                    for s in range(t + 1):
                        W[t, s] = CB[t, s] * decay[j, t, s] * dt[b, lo + s, j]
                add_product(y_j[:size], W[:size, :size], x_j[:size])
                for t in range(size):
                    y_t, y_jt = y[b, lo + t], y_j[t]
                    for p in range(headdim):
                        y_t[first + p] = y_jt[p]
                kept[first : first + headdim] = start[size - 1, j]
            _carry(h[b], kept, B[b, now].T, written[:size])


@jit
def _backward(
    x: Array,
    dt: Array,
    a: Array,
    B: Array,
    C: Array,
    D: Array,
    is_init: Array,
    outer: Array,
    marks: Array,
    grad_y: Array,
    grad_h: Array,
    grad_x: Array,
    grad_dt: Array,
    grad_a: Array,
    grad_B: Array,
    grad_C: Array,
    grad_D: Array,
    decay: Array,
    start: Array,
    CB: Array,
    W: Array,
    grad_CB: Array,
    grad_W: Array,
    written: Array,
    grad_read: Array,
    grad_written: Array,
    kept: Array,
    grad_kept: Array,
    x_j: Array,
    y_j: Array,
    grad_x_j: Array,
    grad_end: Array,
    grad_start: Array,
) -> None:
    """`grad_h` comes as the gradient of the last state and leaves as that of the first."""
    rows, steps, channels = x.shape
    heads = D.shape[0]
    headdim = channels // heads
    zero = x.dtype.type(0)
    W[:] = zero
    for b in range(rows):
        for chunk in range(marks.shape[1] - 1, -1, -1):
            lo, hi = chunk * L, min(chunk * L + L, steps)
            size = hi - lo
            now = slice(lo, hi)
            of_chunk = (x[b, now], dt[b, now], a[b, now], B[b, now], C[b, now], is_init[b, now])
            _prepare(*of_chunk, decay, start, CB, written)

            # The states: what is read from the one that enters, what is written to the one that leaves.
            for t in range(size):
                grad_read_t, grad_y_t = grad_read[t], grad_y[b, lo + t]
                for j in range(heads):
                    for p in range(headdim):
                        grad_read_t[j * headdim + p] = start[t, j] * grad_y_t[j * headdim + p]
            grad_written[:] = zero
            add_product(grad_written[:size], B[b, now], grad_h[b])
            add_inner_products(grad_B[b, now], written[:size], grad_h[b])
            add_inner_products(grad_C[b, now], grad_read[:size], marks[b, chunk])
            grad_kept[:] = zero
            for n in range(grad_h.shape[1]):
                h_n, grad_h_n = marks[b, chunk, n], grad_h[b, n]
                for q in range(channels):
                    grad_kept[q] += h_n[q] * grad_h_n[q]
            for j in range(heads):
                kept[j * headdim : (j + 1) * headdim] = start[size - 1, j]
            _carry(grad_h[b], kept, C[b, now].T, grad_read[:size])

            _backward_inside(
                x[b, now], dt[b, now], B[b, now], C[b, now], D, outer[b, now], grad_y[b, now],
                grad_written, grad_kept,
                grad_x[b, now], grad_dt[b, now], grad_a[b, now], grad_B[b, now], grad_C[b, now], grad_D,
                decay, start, CB, W[:size, :size], grad_CB, grad_W[:size, :size],
                x_j[:size], y_j[:size], grad_x_j[:size], grad_end, grad_start,
            )  # fmt: skip


@jit
def _backward_inside(
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    D: Array,
    outer: Array,
    grad_y: Array,
    grad_written: Array,
    grad_kept: Array,
    grad_x: Array,
    grad_dt: Array,
    grad_a: Array,
    grad_B: Array,
    grad_C: Array,
    grad_D: Array,
    decay: Array,
    start: Array,
    CB: Array,
    W: Array,
    grad_CB: Array,
    grad_W: Array,
    x_j: Array,
    y_j: Array,
    grad_x_j: Array,
    grad_end: Array,
    grad_start: Array,
) -> None:
    """The steps of one chunk among themselves, and what `grad_written` and `grad_kept` say of them."""
    size, headdim = x_j.shape
    last = size - 1
    zero = x.dtype.type(0)
    grad_CB[:] = zero
    for j in range(D.shape[0]):
        first = j * headdim
        for t in range(size):
            x_t, y_t, outer_t, grad_written_t = x[t], grad_y[t], outer[t], grad_written[t]
            x_jt, y_jt, grad_x_jt = x_j[t], y_j[t], grad_x_j[t]
            left, along, read = decay[j, last, t] * dt[t, j], zero, zero
            for p in range(headdim):
                x_jt[p] = x_t[first + p]
                y_jt[p] = y_t[first + p]
                along += grad_written_t[first + p] * x_jt[p]
                read += y_jt[p] * outer_t[first + p]
                grad_x_jt[p] = left * grad_written_t[first + p] + D[j] * y_jt[p]
            grad_end[t], grad_start[t] = along, read
        total = zero
        for p in range(headdim):
            total += grad_kept[first + p]
        grad_start[last] += total * start[last, j]

        grad_W[:] = zero
        add_inner_products(grad_W, y_j, x_j)
        for t in range(size):
            grad_D[j] += grad_W[t, t]
            crossing = zero  # gradients of the exponents from steps before s to t
            for s in range(t + 1):
                scaled = CB[t, s] * decay[j, t, s]
                W[t, s] = scaled * dt[s, j]
                grad_CB[t, s] += grad_W[t, s] * decay[j, t, s] * dt[s, j]
                grad_dt[s, j] += grad_W[t, s] * scaled
                grad_a[s, j] += crossing
                crossing += grad_W[t, s] * W[t, s]
        add_product(grad_x_j, W.T, y_j)

        crossing = zero
        for s in range(size):
            grad_dt[s, j] += grad_end[s] * decay[j, last, s]
            grad_a[s, j] += crossing
            crossing += grad_end[s] * decay[j, last, s] * dt[s, j]
            grad_x_s, grad_x_js = grad_x[s], grad_x_j[s]
            for p in range(headdim):
                grad_x_s[first + p] = grad_x_js[p]
        crossing = zero
        for s in range(last, -1, -1):
            crossing += grad_start[s]
            grad_a[s, j] += crossing
    add_product(grad_C, grad_CB[:size, :size], B)
    add_product(grad_B, grad_CB[:size, :size].T, C)
