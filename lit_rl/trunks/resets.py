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
    """Where the T real steps of each row stand among the K stretched ones, and the flags of the others.

    `at` ``[B * T]`` counts over all rows: copies and selections of whole steps, whose gradients are such
    themselves, are quicker than indexing by row and step.
    """

    at: Tensor
    flags_BK2: Tensor

    @classmethod
    def around_resets(cls, is_init_BT: Tensor, dtype: torch.dtype) -> StretchedRows:
        """The layout for resets at t >= 1; one at t = 0 needs no step, the caller clears the state it got."""
        B, T = is_init_BT.shape
        device = is_init_BT.device
        resets_BT = torch.cat([torch.zeros_like(is_init_BT[:, :1]), is_init_BT[:, 1:]], dim=1).cumsum(1)
        index_BT = torch.arange(T, device=device) + resets_BT
        K = T + int(resets_BT[:, -1].max())
        at = (index_BT + K * torch.arange(B, device=device)[:, None]).flatten()
        is_real_BK = torch.zeros(B * K, dtype=torch.bool, device=device).index_fill_(0, at, True).view(B, K)
        is_padding_BK = torch.arange(K, device=device) > index_BT[:, -1:]
        is_reset_BK = ~(is_real_BK | is_padding_BK)
        return cls(at, torch.stack([is_reset_BK, is_padding_BK], dim=-1).to(dtype))

    def stretch(self, x_BTF: Tensor) -> Tensor:
        """``[B, T, F]`` to ``[B, K, F]``, zero on the extra steps."""
        (B, K, _), F = self.flags_BK2.shape, x_BTF.shape[-1]
        return x_BTF.new_zeros(B * K, F).index_copy(0, self.at, x_BTF.reshape(-1, F)).view(B, K, F)

    def with_flags(self, x_BKF: Tensor) -> Tensor:
        """``[B, K, F]`` to ``[B, K, F + 2]``."""
        return torch.cat([x_BKF, self.flags_BK2], dim=-1)

    def real_steps(self, y_BKF: Tensor) -> Tensor:
        """``[B, K, F]`` back to ``[B, T, F]``."""
        B, _, F = y_BKF.shape
        return y_BKF.reshape(-1, F).index_select(0, self.at).view(B, -1, F)

    def last_real_step(self, y_BKF: Tensor) -> Tensor:
        """``[B, K, F]`` to ``[B, F]``."""
        return y_BKF.reshape(-1, y_BKF.shape[-1]).index_select(0, self.at.view(len(y_BKF), -1)[:, -1])
