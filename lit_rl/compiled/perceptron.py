"""Layers of a multilayer perceptron compiled by numba: forward and backward, on one core of the CPU.

With few rows each operation of its own costs more than its arithmetic, and torch's products of such sizes
leave half of a processor that is not Intel's unused.

Arrays: x [N, F]; weight [D, F]; bias [D]; y [N, D], what a layer gives; a name with `grad_` before it is the
gradient of what the rest names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import grad as gradient_of

from lit_rl.compiled import Array, arrays
from lit_rl.compiled.exp import exp
from lit_rl.compiled.jit import jit
from lit_rl.compiled.products import PART, add_inner_products, add_outer_products, add_product

IDENTITY, TANH, RELU = 0, 1, 2

# From so many rows on, and up to so many features, it pays to transpose the weight first.
ROWS_TO_TRANSPOSE, FEATURES_TO_TRANSPOSE = 32, 128


def compiled_layers(
    x_NF: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: int
) -> Tensor:
    """``f(W_L .. f(W_1 x + b_1) .. + b_L)``, ``[N, D]``; all on the CPU, float32 or float64."""
    return _CompiledLayers.apply(x_NF, activation, *weights, *biases)


def layer_of(x: Array, weight: Array, bias: Array, activation: int) -> Array:
    """``f(W x + b)``, without gradient."""
    y = np.empty((len(x), len(weight)), x.dtype)
    _fill_layer(x, weight, bias, activation, y)
    return y


def _fill_layer(x: Array, weight: Array, bias: Array, activation: int, y: Array) -> None:
    D, F = weight.shape
    is_transposed = len(x) >= ROWS_TO_TRANSPOSE and F <= FEATURES_TO_TRANSPOSE
    _layer(x, weight, bias, activation, np.empty((F if is_transposed else 0, D), x.dtype), y)


class _CompiledLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NF: Tensor, activation: int, *weights_and_biases: Tensor) -> Tensor:
        x, *parameters = arrays(x_NF.contiguous(), *(p.contiguous() for p in weights_and_biases))
        layers = len(parameters) // 2
        outputs: list[Tensor] = []
        for weight, bias in zip(parameters[:layers], parameters[layers:], strict=True):
            outputs.append(x_NF.new_empty(len(x), len(weight)))  # by torch, which counts what is kept
            y = outputs[-1].numpy()
            _fill_layer(x, weight, bias, activation, y)
            x = y
        ctx.activation = activation
        ctx.save_for_backward(x_NF, *weights_and_biases, *outputs)
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_NF, *rest = ctx.saved_tensors
        layers = len(rest) // 3
        if torch.is_grad_enabled():  # a second derivative is asked for
            return _differentiable_backward(ctx, x_NF, rest[: 2 * layers], grad_ND)
        weights = arrays(*(weight.contiguous() for weight in rest[:layers]))
        x, grad, *outputs = arrays(x_NF.contiguous(), grad_ND.contiguous(), *rest[2 * layers :])
        found: list[tuple[Array, Array]] = []  # of weight and bias, from the last layer to the first
        for layer in reversed(range(layers)):
            below, wants_x = (outputs[layer - 1], True) if layer else (x, ctx.needs_input_grad[0])
            step = (grad, below, outputs[layer], weights[layer])
            grad, grad_weight, grad_bias = layer_gradients(*step, ctx.activation, wants_x=wants_x)
            found.append((grad_weight, grad_bias))
        grad_weights, grad_biases = zip(*reversed(found), strict=True)
        grads = map(torch.from_numpy, (*grad_weights, *grad_biases))
        return torch.from_numpy(grad) if ctx.needs_input_grad[0] else None, None, *grads


def layer_gradients(
    grad_y: Array, x: Array, y: Array, weight: Array, activation: int, *, wants_x: bool
) -> tuple[Array, Array, Array]:
    """Those of x (empty unless wanted), weight and bias, from what `layer_of` was given and gave."""
    grad_x = np.zeros(x.shape if wants_x else (0, 0), x.dtype)
    grad_weight, grad_bias = np.zeros(weight.shape, x.dtype), np.zeros(len(weight))  # a long sum, in float64
    room = np.empty(weight.shape if len(x) > PART else (0, 0), x.dtype)
    before = np.empty(y.shape, x.dtype)
    _layer_backward(grad_y, x, y, weight, activation, before, room, grad_x, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias.astype(x.dtype)


def _differentiable_backward(
    ctx: Any, x_NF: Tensor, parameters: list[Tensor], grad_ND: Tensor
) -> tuple[Tensor | None, ...]:
    """The same gradients by torch's operations, which can be differentiated in turn."""
    f = {TANH: torch.tanh, RELU: torch.relu}[ctx.activation]
    # Of other names for the same tensors: theirs may depend on one another, or be one and the same.
    x_NF, *parameters = (tensor.view_as(tensor) for tensor in (x_NF, *parameters))
    layers = len(parameters) // 2
    y = x_NF
    for weight, bias in zip(parameters[:layers], parameters[layers:], strict=True):
        y = f(torch.nn.functional.linear(y, weight, bias))
    inputs = [x_NF, *parameters]
    asked = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
    wanted = [tensor for tensor, is_asked in zip(inputs, asked, strict=True) if is_asked]
    found = iter(gradient_of(y, wanted, grad_ND, create_graph=True))
    grad_x, *grads = [next(found) if is_asked else None for is_asked in asked]
    return grad_x, None, *grads


@jit
def _layer(x: Array, weight: Array, bias: Array, activation: int, transposed: Array, y: Array) -> None:
    """Fills `y`; `transposed` is room for the weight `[F, D]`, or empty if that is not worth its while."""
    one, two, zero = y.dtype.type(1), y.dtype.type(2), y.dtype.type(0)
    for i in range(y.shape[0]):
        y_i = y[i]
        for d in range(y_i.shape[0]):
            y_i[d] = bias[d]
    if transposed.shape[0] > 0:
        for f in range(transposed.shape[0]):
            column = transposed[f]
            for d in range(column.shape[0]):
                column[d] = weight[d, f]
        add_product(y, x, transposed)
    else:
        add_inner_products(y, x, weight)
    for i in range(y.shape[0]):
        y_i = y[i]
        if activation == TANH:
            for d in range(y_i.shape[0]):
                y_i[d] = one - two / (one + exp(two * y_i[d]))
        elif activation == RELU:
            for d in range(y_i.shape[0]):
                y_i[d] = max(y_i[d], zero)


@jit
def _layer_backward(
    grad_y: Array,
    x: Array,
    y: Array,
    weight: Array,
    activation: int,
    grad: Array,
    room: Array,
    grad_x: Array,
    grad_weight: Array,
    grad_bias: Array,
) -> None:
    """Adds to the last three, the first of which may be empty; `grad [N, D]` is room, that before f."""
    one, zero = y.dtype.type(1), y.dtype.type(0)
    for i in range(grad.shape[0]):
        grad_i, grad_y_i, y_i = grad[i], grad_y[i], y[i]
        if activation == TANH:
            for d in range(grad_i.shape[0]):
                grad_i[d] = grad_y_i[d] * (one - y_i[d] * y_i[d])
        elif activation == RELU:
            for d in range(grad_i.shape[0]):
                grad_i[d] = grad_y_i[d] if y_i[d] > zero else zero
        else:
            for d in range(grad_i.shape[0]):
                grad_i[d] = grad_y_i[d]
        for d in range(grad_bias.shape[0]):
            grad_bias[d] += grad_i[d]
    if room.shape[0] > 0:
        add_outer_products(grad_weight, grad, x, room)
    else:
        add_product(grad_weight, grad.T, x)
    if grad_x.shape[0] > 0:
        add_product(grad_x, grad, weight)
