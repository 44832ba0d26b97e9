"""The causal convolution and SiLU behind it compiled by numba: float32 and float64 on the CPU, on one core.

The equation of `convolution`, a step at a time, so that the rows of D numbers stay in the cache; what stands
before SiLU is kept for the backward pass. Sums over steps are taken `PART` steps at a time, which keeps their
rounding small.

Arrays: window [B, S, D]; weight [W, D]; bias [D]; is_init [B, T]; before (SiLU) and y [B, T, D]; a name with
`grad_` before it is the gradient of what the rest names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl.autograd import first_order
from lit_rl.compiled import Array, arrays
from lit_rl.compiled.exp import exp
from lit_rl.compiled.jit import jit_in_order

PART = 64


def compiled_convolution(window_BSD: Tensor, weight_WD: Tensor, bias_D: Tensor, is_init_BT: Tensor) -> Tensor:
    """``silu(convolution)`` ``[B, T, D]``; what stands before the first step is of its episode."""
    y: Tensor = _CompiledConvolution.apply(window_BSD, weight_WD, bias_D, is_init_BT)
    return y


class _CompiledConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, window_BSD: Tensor, weight_WD: Tensor, bias_D: Tensor, is_init_BT: Tensor
    ) -> Tensor:
        inputs = [tensor.contiguous() for tensor in (window_BSD, weight_WD, bias_D, is_init_BT)]
        before = window_BSD.new_empty(*is_init_BT.shape, window_BSD.shape[2])
        y = torch.empty_like(before)
        _forward(*arrays(*inputs, before, y))
        ctx.save_for_backward(*inputs, before)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        window, weight, bias, is_init, before = ctx.saved_tensors
        grad_window, grad_weight, grad_bias = (torch.zeros_like(t) for t in (window, weight, bias))
        room = [torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(bias)]
        _backward(
            *arrays(window, weight, is_init, before, grad_y.contiguous()),
            *arrays(grad_window, grad_weight, grad_bias, *room),
        )
        return grad_window, grad_weight, grad_bias, None


@jit_in_order
def _forward(window: Array, weight: Array, bias: Array, is_init: Array, before: Array, y: Array) -> None:
    rows, steps, channels = y.shape
    past = weight.shape[0] - 1
    one = y.dtype.type(1)
    for b in range(rows):
        seen = past  # taps that see the step's own episode
        for t in range(steps):
            seen = 0 if is_init[b, t] else min(seen + 1, past)
            before_t, y_t = before[b, t], y[b, t]
            x, w = window[b, t + past], weight[past]
            for d in range(channels):
                before_t[d] = bias[d] + w[d] * x[d]
            for k in range(1, seen + 1):
                x, w = window[b, t + past - k], weight[past - k]
                for d in range(channels):
                    before_t[d] += w[d] * x[d]
            for d in range(channels):
                y_t[d] = before_t[d] / (one + exp(-before_t[d]))


@jit_in_order
def _backward(
    window: Array,
    weight: Array,
    is_init: Array,
    before: Array,
    grad_y: Array,
    grad_window: Array,
    grad_weight: Array,
    grad_bias: Array,
    part_weight: Array,
    part_bias: Array,
    g: Array,
) -> None:
    rows, steps, channels = grad_y.shape
    past = weight.shape[0] - 1
    zero, one = grad_y.dtype.type(0), grad_y.dtype.type(1)
    for b in range(rows):
        seen = past
        for start in range(0, steps, PART):
            part_weight[:] = zero
            part_bias[:] = zero
            for t in range(start, min(start + PART, steps)):
                seen = 0 if is_init[b, t] else min(seen + 1, past)
                before_t, grad_y_t = before[b, t], grad_y[b, t]
                for d in range(channels):
                    s = one / (one + exp(-before_t[d]))
                    g[d] = grad_y_t[d] * s * (one + before_t[d] * (one - s))
                    part_bias[d] += g[d]
                for k in range(seen + 1):
                    x, w = window[b, t + past - k], weight[past - k]
                    grad_x, part_w = grad_window[b, t + past - k], part_weight[past - k]
                    for d in range(channels):
                        grad_x[d] += g[d] * w[d]
                        part_w[d] += g[d] * x[d]
            for d in range(channels):
                grad_bias[d] += part_bias[d]
            for k in range(past + 1):
                for d in range(channels):
                    grad_weight[k, d] += part_weight[k, d]
