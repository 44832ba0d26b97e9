"""Which steps belong to one episode: what the layers ask of `is_init`.

Shapes: B rows, T time steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def may_reset_inside(is_init_BT: Tensor) -> bool:
    """Whether a reset may stand at t >= 1, so that steps of one pass must be told apart.

    Looked up where looking is cheap. On an accelerator it would stall the device and under `torch.compile` it
    would break the graph; there the answer is yes whenever T > 1.
    """
    if is_init_BT.shape[1] == 1:
        return False
    if is_init_BT.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool(is_init_BT[:, 1:].any())


def episode_numbers(is_init_BT: Tensor) -> Tensor:
    """``[B, T]``, how many resets row b has had up to and including step t.

    0 is the episode that the state given to the pass belongs to.
    """
    return is_init_BT.cumsum(dim=1)
