"""Linear maps that take the faster of torch's two libraries for matrix products on a CPU.

torch multiplies float32 matrices by MKL, which leaves AVX-512 unused on processors that are not Intel's. The
other library in its CPU builds, oneDNN, uses it, but each call costs some microseconds more. So large
products go there, and everything else the way of `nn.Linear`.

Shapes: N rows, F input features, D output features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

# Multiplications from which oneDNN was the quicker, forward and backward.
LARGE = 2**22


def _has_onednn() -> bool:
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


HAS_ONEDNN = _has_onednn()


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` as by `torch.nn.functional.linear`.

    Args:
        x: ``[..., F]``.
        weight: ``[D, F]``.
        bias: ``[D]``.
    """
    if not _fits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    y_ND: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y_ND.view(*x.shape[:-1], -1)


def _fits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Large and float32 on a CPU that gains by it, and nothing around that wants to see `linear` itself.

    What is no linear map is left to torch and its messages.
    """
    if not HAS_ONEDNN or torch.compiler.is_compiling() or x.numel() * weight.shape[0] < LARGE:
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors):
        return False
    if weight.shape[1:] != x.shape[-1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    """Its gradients are linear maps too and go the same way, so that they can be differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, x_NF: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NF, weight_DF)
        if not (weight_DF.is_contiguous() or weight_DF.t().is_contiguous()):
            weight_DF = weight_DF.contiguous()  # of other layouts oneDNN has no fast product
        bias_D = None if bias_D is None else bias_D.contiguous()
        y_ND: Tensor = torch.ops.mkldnn._linear_pointwise(x_NF, weight_DF, bias_D, "none", [], "")
        return y_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_NF, weight_DF = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _Linear.apply(grad_ND, weight_DF.t(), None) if wants_x else None,
            _weight_gradient(x_NF, grad_ND) if wants_weight else None,
            grad_ND.sum(0) if wants_bias else None,
        )


def _weight_gradient(x_NF: Tensor, grad_ND: Tensor) -> Tensor:
    """``grad.T @ x``, with the smaller factor on the left, which oneDNN copies to lie row by row."""
    if grad_ND.shape[1] < x_NF.shape[1]:
        return _Linear.apply(grad_ND.t(), x_NF.t(), None)
    return _Linear.apply(x_NF.t(), grad_ND.t(), None).t()
