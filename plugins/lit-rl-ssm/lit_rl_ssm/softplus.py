"""Softplus, which torch has in no vectorised form on CPUs; here it is a loop compiled by numba, on one core.

    softplus(x) = max(x, 0) + log1p(e),    e = exp(-|x|) <= 1,    log1p(e) = 2 atanh(e / (2 + e))

Nothing cancels, so small results are as exact as large ones. In float32 atanh is its series up to s^15, with
s <= 1/3 (remainder below 2e-9 of it).

Shapes: x ``[...]``; arrays are flat.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rl.autograd import first_order
from lit_rl.compiled import Array, arrays, can_be_compiled
from lit_rl.compiled.exp import exp
from lit_rl.compiled.jit import jit_in_order

FEW = 1024  # numbers up to which torch's operation takes less time than to call a loop


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``."""
    if x.numel() <= FEW or not can_be_compiled(x):
        return F.softplus(x)
    y: Tensor = _Softplus.apply(x)
    return y


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = x.new_empty(x.shape)
        loop = _forward_float32 if x.dtype == torch.float32 else _forward
        loop(*arrays(x.flatten(), y.view(-1)))
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = x.new_empty(x.shape)
        _backward(*arrays(x.flatten(), grad_y.flatten(), grad_x.view(-1)))
        return grad_x


_ONE, _TWO, _ZERO = np.float32(1), np.float32(2), np.float32(0)
_3, _5, _7, _9, _11, _13, _15 = (np.float32(1 / odd) for odd in range(3, 17, 2))


@jit_in_order
def _forward_float32(x: Array, y: Array) -> None:
    for i in range(y.shape[0]):
        e = exp(-abs(x[i]))
        s = e / (_TWO + e)
        q = s * s
        series = ((((((_15 * q + _13) * q + _11) * q + _9) * q + _7) * q + _5) * q + _3) * q + _ONE
        y[i] = max(x[i], _ZERO) + _TWO * s * series


@jit_in_order
def _forward(x: Array, y: Array) -> None:
    for i in range(y.shape[0]):
        y[i] = max(x[i], 0.0) + math.log1p(math.exp(-abs(x[i])))


@jit_in_order
def _backward(x: Array, grad_y: Array, grad_x: Array) -> None:
    """Times the logistic function."""
    one = x.dtype.type(1)
    for i in range(grad_x.shape[0]):
        grad_x[i] = grad_y[i] / (one + exp(-x[i]))
