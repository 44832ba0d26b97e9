"""CUDA kernels of optional packages: which are there, and Mamba-2's way through one of them.

A kernel is looked for by itself, since the packages install apart and one may be broken while another works.

`chunk_scan_by_kernel` has not run on a GPU yet: it is written after the signature and the meaning that
mamba_ssm 2.3 publishes, and checked on the CPU with a stand-in.

Shapes: B rows, T time steps, H heads, P = headdim, N = d_state.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lit_rl_ssm.episodes import episode_numbers

Function = Callable[..., Any]

INSTALL = "pip install 'lit-rl-ssm[cuda]'"

# The kernel's own chunks, a power of two: the size its authors publish.
KERNEL_CHUNK = 256


@dataclass(frozen=True)
class Kernel:
    """A function of an optional package."""

    module: str
    name: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def require(self) -> Function:
        """The function, or ImportError with one line that says what is missing and how to get it."""
        if find_spec(self.package) is None:
            raise ImportError(f"{self.name} needs the package {self.package}, not installed here: {INSTALL}")
        # Triton multiplies float32 with 10 bits of mantissa unless told otherwise before a kernel compiles;
        # then learning and acting would disagree. A choice already made stands.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        try:
            return getattr(import_module(self.module), self.name)
        except (ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ImportError(
                f"{self.name} of {self.module} does not import ({reason}): {INSTALL}"
            ) from error

    @cache  # noqa: B019 - kernels are a few constants
    def find(self) -> Function | None:
        """The function where this machine can run it, else None; a broken package is warned of once."""
        if not torch.cuda.is_available() or find_spec(self.package) is None:
            return None
        try:
            return self.require()
        except ImportError as error:
            warnings.warn(f"{error}; going on without it", RuntimeWarning, stacklevel=2)
            return None


CHUNK_SCAN = Kernel("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
SELECTIVE_SCAN = Kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
CAUSAL_CONVOLUTION = Kernel("causal_conv1d", "causal_conv1d_fn")

BACKENDS: dict[str, Callable[[Kernel], Function | None]] = {
    "auto": Kernel.find,
    "torch": lambda kernel: None,
    "cuda": Kernel.require,
}


def kernel_for(kernel: Kernel, backend: str) -> Function | None:
    """What a layer built with `backend` may run, or None for tensor operations alone.

    Raises:
        ValueError: no such backend.
        ImportError: the backend is "cuda" and the kernel is not there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    return BACKENDS[backend](kernel)


def runs_on(x: Tensor) -> bool:
    """Whether kernels take this tensor: they know CUDA alone, and no float64."""
    return x.is_cuda and x.dtype != torch.float64


def chunk_scan_by_kernel(
    kernel: Function,
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    is_init_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """`ssd.ssd` by `mamba_chunk_scan_combined`.

    The kernel passes states on between steps of one `seq_idx`, and the initial state belongs to 0. So the
    numbers of episodes say all: a row whose first step is a reset begins with 1. Its initial state is zeroed
    besides, in case a version of the kernel does not compare the first chunk.
    """
    y_BTHP, state_BHPN = kernel(
        x_BTHP,
        dt_BTH,
        A_H,
        B_BTN[:, :, None],
        C_BTN[:, :, None],
        chunk_size=KERNEL_CHUNK,
        D=D_H,
        initial_states=state_BHPN.masked_fill(is_init_BT[:, :1, None, None], 0),
        seq_idx=episode_numbers(is_init_BT).int(),
        return_final_states=True,
    )
    return y_BTHP, state_BHPN.to(x_BTHP.dtype)
