"""Resets inside a sequence for kernels that know none: give each reset a time step of its own.

Fused recurrent kernels run a whole sequence at once and never look at `is_init`. So a row is stretched:
before every step with a reset stands one extra step whose input switches the gates such that the memory
becomes exactly zero. Rows with fewer resets than the fullest one are padded at their end::

    steps     x0 x1 x2 x3       is_init at 2     ->   x0 x1 R  x2 x3
    steps     x0 x1 x2 x3       no reset         ->   x0 x1 x2 x3 P

The extra steps are all zero but for two flags appended to the features, 1 on R and 1 on P. The kernel is
given constant weights for them which saturate its gates (`SATURATE`).

Shapes: B rows, T real steps, K stretched steps (T + resets of the fullest row), F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# sigmoid(-1e4) is 0 and sigmoid(1e4) is 1, exactly and with gradient 0, in every float type (float16 ends at
# 65504), and gates never come near 1e4 by themselves.
SATURATE = 1e4


@dataclass(frozen=True)
class StretchedRows:
    """Where the T real steps of each row stand among the K stretched ones, and the flags of the others."""

    row_B1: Tensor
    index_BT: Tensor
    flags_BK2: Tensor

    @classmethod
    def around_resets(cls, is_init_BT: Tensor, dtype: torch.dtype) -> StretchedRows:
        """The layout for resets at t >= 1; one at t = 0 needs no step, the caller clears the state it got."""
        B, T = is_init_BT.shape
        device = is_init_BT.device
        resets_BT = torch.cat([torch.zeros_like(is_init_BT[:, :1]), is_init_BT[:, 1:]], dim=1).cumsum(1)
        row_B1 = torch.arange(B, device=device)[:, None]
        index_BT = torch.arange(T, device=device) + resets_BT
        K = T + int(resets_BT[:, -1].max())
        is_real_BK = torch.zeros(B, K, dtype=torch.bool, device=device)
        is_real_BK[row_B1, index_BT] = True
        is_padding_BK = torch.arange(K, device=device) > index_BT[:, -1:]
        is_reset_BK = ~(is_real_BK | is_padding_BK)
        return cls(row_B1, index_BT, torch.stack([is_reset_BK, is_padding_BK], dim=-1).to(dtype))

    def stretch(self, x_BTF: Tensor) -> Tensor:
        """``[B, T, F]`` to ``[B, K, F]``, zero on the extra steps."""
        x_BKF = x_BTF.new_zeros(*self.flags_BK2.shape[:2], x_BTF.shape[-1])
        return x_BKF.index_put((self.row_B1, self.index_BT), x_BTF)

    def with_flags(self, x_BKF: Tensor) -> Tensor:
        """``[B, K, F]`` to ``[B, K, F + 2]``."""
        return torch.cat([x_BKF, self.flags_BK2], dim=-1)

    def real_steps(self, y_BKF: Tensor) -> Tensor:
        """``[B, K, F]`` back to ``[B, T, F]``."""
        return y_BKF[self.row_B1, self.index_BT]

    def last_real_step(self, y_BKF: Tensor) -> Tensor:
        """``[B, K, F]`` to ``[B, F]``."""
        return y_BKF[self.row_B1[:, 0], self.index_BT[:, -1]]
