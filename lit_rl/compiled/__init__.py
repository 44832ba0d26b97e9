"""Loops compiled by numba, for the CPU: what they share, and those of LSTM, GRU, MLP and losses.

numba compiles on first use, some seconds a dtype, and keeps the result beside the source or in the user's
cache, if it may write there. To import it takes half a second; so this file does not, and the files beside it
are imported where they are needed.

A kept result is made anew when its own file changes, not when a file does from which it calls: after a change
in `exp`, `jit` or `products` delete the ``*.nbi`` beside all callers, or what runs is the code of before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

Array = np.ndarray[Any, np.dtype[Any]]  # of one float type or bool, as a loop is given it


def can_be_compiled(*tensors: Tensor) -> bool:
    """Whether loops over these can be: tensors on the CPU, all float32 or all float64, nothing traced.

    Traced by compilers, functional transforms, forward-mode derivatives or modes that see every operation.
    """
    first = tensors[0].dtype
    if first not in (torch.float32, torch.float64):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return False
    return all(tensor.is_cpu and tensor.dtype == first for tensor in tensors)


def arrays(*tensors: Tensor) -> list[Array]:
    """Numpy's view of tensors on the CPU."""
    return [tensor.detach().numpy() for tensor in tensors]
