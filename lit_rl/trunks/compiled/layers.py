"""Layers of a multilayer perceptron compiled by numba, for acting: on one core of the CPU, no gradient.

With few rows, each operation of its own costs more than its arithmetic.
"""

from __future__ import annotations

from lit_rl.trunks.compiled import Array
from lit_rl.trunks.compiled.exp import exp
from lit_rl.trunks.compiled.jit import jit
from lit_rl.trunks.compiled.products import add_inner_products, add_product


@jit
def layers_then_head(
    x: Array,
    first: Array,
    inner: Array,
    biases: Array,
    head: Array,
    head_bias: Array,
    is_tanh: bool,
    room: Array,
    y: Array,
) -> None:
    """``y = head(f(.. f(x))``, each f a linear map and then tanh or else ReLU.

    Args:
        x: ``[N, F]``.
        first: weights of the first layer, ``[F, D]``: transposed, as those of the next.
        inner: of the other layers, ``[L - 1, D, D]``.
        biases: ``[L, D]``.
        head: ``[P, D]``, not transposed.
        head_bias: ``[P]``.
        is_tanh: which activation.
        room: ``[L, N, D]``, what layers give.
        y: ``[N, P]``, the result.
    """
    one, two, zero = y.dtype.type(1), y.dtype.type(2), y.dtype.type(0)
    for layer in range(biases.shape[0]):
        out, bias = room[layer], biases[layer]
        for i in range(out.shape[0]):
            row = out[i]
            for d in range(row.shape[0]):
                row[d] = bias[d]
        if layer == 0:
            add_product(out, x, first)
        else:
            add_product(out, room[layer - 1], inner[layer - 1])
        for i in range(out.shape[0]):
            row = out[i]
            if is_tanh:
                for d in range(row.shape[0]):
                    row[d] = one - two / (one + exp(two * row[d]))
            else:
                for d in range(row.shape[0]):
                    row[d] = max(row[d], zero)
    for i in range(y.shape[0]):
        y[i] = head_bias
    add_inner_products(y, room[biases.shape[0] - 1], head)
