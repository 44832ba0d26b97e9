"""RMSNorm, plain and gated, compiled by numba: float32 and float64 on the CPU, on one core.

    y = g / sqrt(mean(g^2) + eps) * weight,        g = x, or x * silu(z) where it is gated

A row at a time, so that it is read once. Sums over rows are taken `PART` rows at a time, which keeps their
rounding small.

Arrays: x, z, y [R, D]; weight [D]; scale [R], one over the root; a name with `grad_` before it is the
gradient of what the rest names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_rl.autograd import first_order
from lit_rl.compiled import Array, arrays
from lit_rl.compiled.exp import exp
from lit_rl.compiled.jit import jit

PART = 64


def compiled_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of ``[..., D]``."""
    y: Tensor = _CompiledNorm.apply(x, weight_D, eps)
    return y


def compiled_gated_norm(x: Tensor, z: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of ``x * silu(z)``, each ``[..., D]``."""
    y: Tensor = _CompiledGatedNorm.apply(x, z, weight_D, eps)
    return y


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


class _CompiledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_RD = _rows(x)
        y_RD, scale_R = torch.empty_like(x_RD), x_RD.new_empty(len(x_RD))
        _forward(*arrays(x_RD, weight_D, scale_R, y_RD), eps)
        ctx.save_for_backward(x_RD, weight_D, scale_R)
        return y_RD.view(x.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_D, scale_R = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_RD), torch.zeros_like(weight_D)
        room = torch.empty_like(weight_D)
        _backward(*arrays(x_RD, weight_D, scale_R, _rows(grad_y), grad_x, grad_weight, room))
        return grad_x.view(grad_y.shape), grad_weight, None


class _CompiledGatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_RD, z_RD = _rows(x), _rows(z)
        y_RD, scale_R = torch.empty_like(x_RD), x_RD.new_empty(len(x_RD))
        _gated_forward(*arrays(x_RD, z_RD, weight_D, scale_R, y_RD), eps)
        ctx.save_for_backward(x_RD, z_RD, weight_D, scale_R)
        return y_RD.view(x.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, z_RD, weight_D, scale_R = ctx.saved_tensors
        grad_x, grad_z, grad_weight = (torch.zeros_like(t) for t in (x_RD, z_RD, weight_D))
        room = [torch.empty_like(weight_D) for _ in range(3)]
        inputs = (x_RD, z_RD, weight_D, scale_R, _rows(grad_y))
        _gated_backward(*arrays(*inputs, grad_x, grad_z, grad_weight, *room))
        return grad_x.view(grad_y.shape), grad_z.view(grad_y.shape), grad_weight, None


@jit
def _forward(x: Array, weight: Array, scale: Array, y: Array, eps: float) -> None:
    rows, channels = x.shape
    for r in range(rows):
        x_r, y_r = x[r], y[r]
        total = x.dtype.type(0)
        for d in range(channels):
            total += x_r[d] * x_r[d]
        s = x.dtype.type(1 / np.sqrt(total / channels + eps))
        scale[r] = s
        for d in range(channels):
            y_r[d] = x_r[d] * s * weight[d]


@jit
def _backward(
    x: Array, weight: Array, scale: Array, grad_y: Array, grad_x: Array, grad_weight: Array, part: Array
) -> None:
    rows, channels = x.shape
    zero = x.dtype.type(0)
    for start in range(0, rows, PART):
        part[:] = zero
        for r in range(start, min(start + PART, rows)):
            x_r, grad_y_r, grad_x_r, s = x[r], grad_y[r], grad_x[r], scale[r]
            along = zero
            for d in range(channels):
                product = grad_y_r[d] * x_r[d] * s
                part[d] += product
                along += product * weight[d]
            along = x.dtype.type(along / channels) * s  # what would only stretch x, which the norm takes back
            for d in range(channels):
                grad_x_r[d] = s * (grad_y_r[d] * weight[d] - along * x_r[d])
        for d in range(channels):
            grad_weight[d] += part[d]


@jit
def _gated_forward(x: Array, z: Array, weight: Array, scale: Array, y: Array, eps: float) -> None:
    rows, channels = x.shape
    one = x.dtype.type(1)
    for r in range(rows):
        x_r, z_r, y_r = x[r], z[r], y[r]
        for d in range(channels):
            y_r[d] = x_r[d] * z_r[d] / (one + exp(-z_r[d]))
        total = x.dtype.type(0)
        for d in range(channels):
            total += y_r[d] * y_r[d]
        s = x.dtype.type(1 / np.sqrt(total / channels + eps))
        scale[r] = s
        for d in range(channels):
            y_r[d] *= s * weight[d]


@jit
def _gated_backward(
    x: Array,
    z: Array,
    weight: Array,
    scale: Array,
    grad_y: Array,
    grad_x: Array,
    grad_z: Array,
    grad_weight: Array,
    part: Array,
    gate: Array,
    g: Array,
) -> None:
    rows, channels = x.shape
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for start in range(0, rows, PART):
        part[:] = zero
        for r in range(start, min(start + PART, rows)):
            x_r, z_r, grad_y_r, grad_x_r, grad_z_r, s = x[r], z[r], grad_y[r], grad_x[r], grad_z[r], scale[r]
            for d in range(channels):
                gate[d] = one / (one + exp(-z_r[d]))
                g[d] = x_r[d] * z_r[d] * gate[d]
            along = zero
            for d in range(channels):
                product = grad_y_r[d] * g[d] * s
                part[d] += product
                along += product * weight[d]
            along = x.dtype.type(along / channels) * s
            for d in range(channels):
                grad_g = s * (grad_y_r[d] * weight[d] - along * g[d])
                grad_x_r[d] = grad_g * z_r[d] * gate[d]
                grad_z_r[d] = grad_g * x_r[d] * gate[d] * (one + z_r[d] * (one - gate[d]))
        for d in range(channels):
            grad_weight[d] += part[d]
