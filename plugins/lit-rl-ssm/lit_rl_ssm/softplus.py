"""Softplus without log1p, of which torch has no vectorised form on CPUs and which is slow there.

    softplus(x) = max(x, 0) + log1p(e),    e = exp(-|x|) <= 1,    log1p(e) = 2 atanh(e / (2 + e))

Nothing cancels, so small results are as exact as large ones. Shapes: x ``[...]``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rl.autograd import first_order

FEW = 2048  # numbers up to which one slow operation takes less time than several quick ones


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``."""
    if not x.is_cpu or x.dtype not in (torch.float32, torch.float64) or x.numel() <= FEW:
        return F.softplus(x)
    y: Tensor = _Softplus.apply(x)
    return y


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        e = x.abs().neg_().exp_()
        return e.div_(e + 2).atanh_().mul_(2).add_(x.clamp_min(0))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * x.sigmoid()
