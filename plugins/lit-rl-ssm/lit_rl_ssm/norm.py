"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), plain and gated.

    y = x / sqrt(mean(x^2) + eps) * weight

torch composes it of small operations on the CPU; there a compiled loop does it (`compiled_norm`). Elsewhere
torch has a kernel, which is used.

Shapes: x and z ``[..., D]``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from lit_rl.compiled import can_be_compiled
from lit_rl_ssm.compiled_norm import compiled_gated_norm, compiled_norm


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension, with its parameter `weight`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] == self.weight.shape and can_be_compiled(x, self.weight):
            return compiled_norm(x, self.weight, self.eps)
        return super().forward(x)

    def gated(self, x: Tensor, z: Tensor) -> Tensor:
        """The norm of ``x * silu(z)``."""
        if x.shape[-1:] == self.weight.shape and x.shape == z.shape and can_be_compiled(x, z, self.weight):
            return compiled_gated_norm(x, z, self.weight, self.eps)
        return super().forward(x * silu(z))
