"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) with its gradient by hand on the CPU.

    y = x / sqrt(mean(x^2) + eps) * weight

torch composes it of small operations on the CPU and leaves the gradient to autograd, which takes more of them
and keeps more tensors. Elsewhere torch has a kernel, which is used.

Shapes: x ``[..., D]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension, with its parameter `weight`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps) if x.is_cpu else super().forward(x)
        return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(weight_D, normed, scale)
        return normed * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        weight_D, normed, scale = ctx.saved_tensors
        dweight_D = (dy * normed).reshape(-1, weight_D.shape[0]).sum(0)
        dnormed = dy * weight_D
        # Less what would only stretch x, which the norm takes back.
        along = (dnormed * normed).mean(-1, keepdim=True)
        return dnormed.addcmul_(normed, along, value=-1).mul_(scale), dweight_D, None
