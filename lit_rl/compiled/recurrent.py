"""LSTM and GRU compiled by numba: float32 and float64 on the CPU, on one core but for what `linear` does.

What the inputs give to all gates is one product over all steps. The loop over time holds what is left: the
memory's part of the gates and the gates themselves, all rows at once, with the memory cleared where a reset
stands. Weights' gradients are again products over all steps. ``tanh(x) = 2 sigmoid(2x) - 1``, to the rounding
of 1.

Arrays, time first: into [T, B, G * D], the inputs' part of G gates; gates [T, B, G * D], what they come to;
W [D, G * D], the memory's weights; h, c [B, D], on entry the memory before the first step, on return that
after the last; h_in, c_in [T, B, D], the memory that each step finds; is_init [T, B]; y [T, B, D], h after
each step. A name with `grad_` before it is the gradient of what the rest names; grad_h and grad_c are those
of the last memory on entry, of the first on return.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl.autograd import first_order
from lit_rl.compiled import Array, arrays
from lit_rl.compiled.exp import exp
from lit_rl.compiled.jit import jit
from lit_rl.compiled.products import add_inner_products, add_outer_products, add_product
from lit_rl.linear_maps import linear


def compiled_lstm(
    x_TBF: Tensor,
    h_BD: Tensor,
    c_BD: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    is_init_TB: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y [T, B, D]`` and the last h and c ``[B, D]`` of one layer.

    Args:
        x_TBF: features.
        h_BD: the memory before the first step.
        c_BD: the same of the cell.
        weight_ih: ``[4 * D, F]`` of gates i, f, g, o, as in `nn.LSTM`.
        weight_hh: ``[4 * D, D]``.
        bias: ``[4 * D]``, both of `nn.LSTM`'s together.
        is_init_TB: bool, true where the memory is cleared before the step.
    """
    return _LSTM.apply(x_TBF, h_BD, c_BD, weight_ih, weight_hh, bias, is_init_TB)


def compiled_gru(
    x_TBF: Tensor,
    h_BD: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    is_init_TB: Tensor,
) -> tuple[Tensor, Tensor]:
    """``y [T, B, D]`` and the last h ``[B, D]`` of one layer; see `compiled_lstm`, gates r, z, n."""
    return _GRU.apply(x_TBF, h_BD, weight_ih, weight_hh, bias_ih, bias_hh, is_init_TB)


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TBF: Tensor,
        h_BD: Tensor,
        c_BD: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor,
        is_init_TB: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, is_init, W = x_TBF.contiguous(), is_init_TB.contiguous(), weight_hh.t().contiguous()
        into = linear(x, weight_ih, bias)
        h, c = _copy(h_BD), _copy(c_BD)
        gates = torch.empty_like(into)
        h_in, c_in, tanh_c, y = (x.new_empty(*is_init.shape, len(W)) for _ in range(4))
        _lstm_forward(*arrays(into, W, is_init, h, c, h_in, c_in, gates, tanh_c, y))
        ctx.save_for_backward(x, weight_ih, W, is_init, h_in, c_in, gates, tanh_c)
        return y, h, c

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_ih, W, is_init, h_in, c_in, gates, tanh_c = ctx.saved_tensors
        grad_h, grad_c, grad_gates = _copy(grad_h), _copy(grad_c), torch.empty_like(gates)
        _lstm_backward(
            *arrays(W, is_init, c_in, gates, tanh_c, grad_y.contiguous(), grad_h, grad_c, grad_gates)
        )
        return (
            _input_gradient(grad_gates, weight_ih) if ctx.needs_input_grad[0] else None,
            grad_h,
            grad_c,
            _weight_gradient(x, grad_gates),
            _weight_gradient(h_in, grad_gates),
            grad_gates.sum((0, 1)),
            None,
        )


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TBF: Tensor,
        h_BD: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        is_init_TB: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, is_init, W = x_TBF.contiguous(), is_init_TB.contiguous(), weight_hh.t().contiguous()
        into = linear(x, weight_ih, bias_ih)
        h = _copy(h_BD)
        gates = torch.empty_like(into)
        h_in, recalled, y = (x.new_empty(*is_init.shape, len(W)) for _ in range(3))
        _gru_forward(*arrays(into, W, bias_hh.contiguous(), is_init, h, h_in, gates, recalled, y))
        ctx.save_for_backward(x, weight_ih, W, is_init, h_in, gates, recalled)
        return y, h

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_ih, W, is_init, h_in, gates, recalled = ctx.saved_tensors
        grad_h, grad_into, grad_recalled = _copy(grad_h), torch.empty_like(gates), torch.empty_like(gates)
        _gru_backward(
            *arrays(W, is_init, h_in, gates, recalled, grad_y.contiguous(), grad_h, grad_into, grad_recalled)
        )
        return (
            _input_gradient(grad_into, weight_ih) if ctx.needs_input_grad[0] else None,
            grad_h,
            _weight_gradient(x, grad_into),
            _weight_gradient(h_in, grad_recalled),
            grad_into.sum((0, 1)),
            grad_recalled.sum((0, 1)),
            None,
        )


def _copy(memory_BD: Tensor) -> Tensor:
    return memory_BD.clone(memory_format=torch.contiguous_format)


def _input_gradient(grad_TBG: Tensor, weight_GF: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # like the way forward
        return linear(grad_TBG, weight_GF.t())


def _weight_gradient(x_TBF: Tensor, grad_TBG: Tensor) -> Tensor:
    """``[G, F]``; this product takes both factors as they lie, which torch's would copy first."""
    shape = (x_TBF.shape[-1], grad_TBG.shape[-1])
    gradient, part = grad_TBG.new_zeros(shape), grad_TBG.new_empty(shape)
    add_outer_products(*arrays(gradient, x_TBF.flatten(0, 1), grad_TBG.flatten(0, 1), part))
    return gradient.t()


# Loops run from 0 and add what they start from to the index: numba allows for negative indices elsewhere and
# then forms no vectors. One array is written in each, as more would need too many checks for overlaps.


@jit
def _clear(row: Array) -> None:
    zero = row.dtype.type(0)
    for d in range(row.shape[0]):
        row[d] = zero


@jit
def _lstm_forward(
    into: Array,
    W: Array,
    is_init: Array,
    h: Array,
    c: Array,
    h_in: Array,
    c_in: Array,
    gates: Array,
    tanh_c: Array,
    y: Array,
) -> None:
    steps, rows, _ = y.shape
    one, two = y.dtype.type(1), y.dtype.type(2)
    for t in range(steps):
        for b in range(rows):
            into_b, g, h_b, c_b, h_in_b, c_in_b = into[t, b], gates[t, b], h[b], c[b], h_in[t, b], c_in[t, b]
            D = h_b.shape[0]
            if is_init[t, b]:
                _clear(h_b)
                _clear(c_b)
            for q in range(4 * D):
                g[q] = into_b[q]
            for d in range(D):
                h_in_b[d] = h_b[d]
            for d in range(D):
                c_in_b[d] = c_b[d]
        add_product(gates[t], h_in[t], W)
        for b in range(rows):
            g, h_b, c_b, c_in_b, tanh_b, y_b = gates[t, b], h[b], c[b], c_in[t, b], tanh_c[t, b], y[t, b]
            D = h_b.shape[0]
            for q in range(2 * D):
                g[q] = one / (one + exp(-g[q]))
            for d in range(D):
                g[2 * D + d] = one - two / (one + exp(two * g[2 * D + d]))
            for d in range(D):
                g[3 * D + d] = one / (one + exp(-g[3 * D + d]))
            for d in range(D):
                c_b[d] = g[D + d] * c_in_b[d] + g[d] * g[2 * D + d]
            for d in range(D):
                tanh_b[d] = one - two / (one + exp(two * c_b[d]))
            for d in range(D):
                h_b[d] = g[3 * D + d] * tanh_b[d]
            for d in range(D):
                y_b[d] = h_b[d]


@jit
def _lstm_backward(
    W: Array,
    is_init: Array,
    c_in: Array,
    gates: Array,
    tanh_c: Array,
    grad_y: Array,
    grad_h: Array,
    grad_c: Array,
    grad_gates: Array,
) -> None:
    steps, rows, _ = c_in.shape
    one = W.dtype.type(1)
    for t in range(steps - 1, -1, -1):
        for b in range(rows):
            g, c_in_b, tanh_b, grad_y_b = gates[t, b], c_in[t, b], tanh_c[t, b], grad_y[t, b]
            grad_h_b, grad_c_b, grad_b = grad_h[b], grad_c[b], grad_gates[t, b]
            D = grad_h_b.shape[0]
            for d in range(D):
                grad_h_b[d] += grad_y_b[d]
            for d in range(D):
                grad_c_b[d] += grad_h_b[d] * g[3 * D + d] * (one - tanh_b[d] * tanh_b[d])
            for d in range(D):
                grad_b[d] = grad_c_b[d] * g[2 * D + d] * g[d] * (one - g[d])
            for d in range(D):
                grad_b[D + d] = grad_c_b[d] * c_in_b[d] * g[D + d] * (one - g[D + d])
            for d in range(D):
                grad_b[2 * D + d] = grad_c_b[d] * g[d] * (one - g[2 * D + d] * g[2 * D + d])
            for d in range(D):
                grad_b[3 * D + d] = grad_h_b[d] * tanh_b[d] * g[3 * D + d] * (one - g[3 * D + d])
            for d in range(D):
                grad_c_b[d] *= g[D + d]
            _clear(grad_h_b)
        add_inner_products(grad_h, grad_gates[t], W)
        for b in range(rows):
            if is_init[t, b]:
                _clear(grad_h[b])
                _clear(grad_c[b])


@jit
def _gru_forward(
    into: Array,
    W: Array,
    bias: Array,
    is_init: Array,
    h: Array,
    h_in: Array,
    gates: Array,
    recalled: Array,
    y: Array,
) -> None:
    """`recalled` [T, B, D] keeps the memory's part of n, before the gate r is put to it."""
    steps, rows, _ = y.shape
    one, two = y.dtype.type(1), y.dtype.type(2)
    for t in range(steps):
        for b in range(rows):
            g, h_b, h_in_b = gates[t, b], h[b], h_in[t, b]
            D = h_b.shape[0]
            if is_init[t, b]:
                _clear(h_b)
            for q in range(3 * D):
                g[q] = bias[q]
            for d in range(D):
                h_in_b[d] = h_b[d]
        add_product(gates[t], h_in[t], W)
        for b in range(rows):
            into_b, g, h_b, h_in_b, recalled_b, y_b = (
                into[t, b],
                gates[t, b],
                h[b],
                h_in[t, b],
                recalled[t, b],
                y[t, b],
            )
            D = h_b.shape[0]
            for q in range(2 * D):
                g[q] = one / (one + exp(-(g[q] + into_b[q])))
            for d in range(D):
                recalled_b[d] = g[2 * D + d]
            for d in range(D):
                g[2 * D + d] = one - two / (one + exp(two * (into_b[2 * D + d] + g[d] * recalled_b[d])))
            for d in range(D):
                h_b[d] = g[2 * D + d] + g[D + d] * (h_in_b[d] - g[2 * D + d])
            for d in range(D):
                y_b[d] = h_b[d]


@jit
def _gru_backward(
    W: Array,
    is_init: Array,
    h_in: Array,
    gates: Array,
    recalled: Array,
    grad_y: Array,
    grad_h: Array,
    grad_into: Array,
    grad_recalled: Array,
) -> None:
    """`grad_recalled` [T, B, 3 * D] is of the memory's part of all gates."""
    steps, rows, _ = h_in.shape
    one = W.dtype.type(1)
    for t in range(steps - 1, -1, -1):
        for b in range(rows):
            g, h_in_b, recalled_b, grad_y_b = gates[t, b], h_in[t, b], recalled[t, b], grad_y[t, b]
            grad_h_b, grad_b, grad_recalled_b = grad_h[b], grad_into[t, b], grad_recalled[t, b]
            D = grad_h_b.shape[0]
            for d in range(D):
                grad_h_b[d] += grad_y_b[d]
            for d in range(D):
                grad_b[2 * D + d] = grad_h_b[d] * (one - g[D + d]) * (one - g[2 * D + d] * g[2 * D + d])
            for d in range(D):
                grad_b[D + d] = grad_h_b[d] * (h_in_b[d] - g[2 * D + d]) * g[D + d] * (one - g[D + d])
            for d in range(D):
                grad_b[d] = grad_b[2 * D + d] * recalled_b[d] * g[d] * (one - g[d])
            for q in range(2 * D):
                grad_recalled_b[q] = grad_b[q]
            for d in range(D):
                grad_recalled_b[2 * D + d] = grad_b[2 * D + d] * g[d]
            for d in range(D):
                grad_h_b[d] *= g[D + d]
        add_inner_products(grad_h, grad_recalled[t], W)
        for b in range(rows):
            if is_init[t, b]:
                _clear(grad_h[b])
