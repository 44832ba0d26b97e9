"""How loops are compiled: without Python's lock, and kept on disk where a folder can be written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba


def _compile(loop: Callable[..., None], *, fastmath: set[str]) -> Any:
    compile_it = partial(numba.njit, nogil=True, error_model="numpy", fastmath=fastmath)
    try:
        return compile_it(cache=True)(loop)
    except RuntimeError:  # nowhere to keep it, neither beside the source nor in the user's cache
        return compile_it()(loop)


# The order of summation is free, which sums need to become vector instructions.
jit = partial(_compile, fastmath={"contract", "reassoc", "nsz"})
# A product and a sum may become one instruction, nothing else.
jit_in_order = partial(_compile, fastmath={"contract"})
