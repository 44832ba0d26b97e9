"""How loops are compiled: without Python's lock, and kept on disk where a folder can be written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
from numba.core.codegen import get_host_cpu_features


def fill_registers() -> None:
    """Has loops fill registers of 512 bits, which LLVM leaves half empty on Intel's processors.

    Full ones slowed the clock of the first processors that had them; those with bfloat16 in them came later.
    numba asks when the first loop of a process is declared: where that was another's, nothing changes, and
    else it holds for others' loops, too. What the user has told numba of the processor stays.
    """
    config: Any = numba.config
    features = get_host_cpu_features()
    if config.CPU_FEATURES is None and "+avx512bf16" in features.split(","):
        config.CPU_FEATURES = f"{features},-prefer-256-bit"


def _compile(loop: Callable[..., None], *, fastmath: set[str]) -> Any:
    compile_it = partial(numba.njit, nogil=True, error_model="numpy", fastmath=fastmath)
    try:
        return compile_it(cache=True)(loop)
    except RuntimeError:  # nowhere to keep it, neither beside the source nor in the user's cache
        return compile_it()(loop)


fill_registers()
# The order of summation is free, which sums need to become vector instructions.
jit = partial(_compile, fastmath={"contract", "reassoc", "nsz"})
# A product and a sum may become one instruction, nothing else.
jit_in_order = partial(_compile, fastmath={"contract"})
