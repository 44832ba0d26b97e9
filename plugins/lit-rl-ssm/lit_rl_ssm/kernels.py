"""CUDA kernels of optional packages: which are there, and the ways through those of Mamba-2 and convolutions.

A kernel is looked for by itself, since the packages install apart and one may be broken while another works.
Backend "cuda" demands kernels where a layer is built. What they cannot take when it runs, tensors on the CPU
or in float64, and what would be waste, a single step, goes through tensor operations all the same.

`chunk_scan_by_kernel` and `convolution_by_kernel` have not run on a GPU yet: they are written after the
signatures and the meaning that mamba_ssm 2.3 and causal_conv1d 1.7 publish, and checked on the CPU with
stand-ins.

Shapes: B rows, T time steps, H heads, P = headdim, N = d_state; of the convolution D channels, W taps,
S = W - 1 + T.
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
        if not torch.cuda.is_available():
            raise ImportError(
                f"{self.name} needs a CUDA device and a torch built for it, and torch.cuda.is_available() "
                "is false: choose backend auto or torch"
            )
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
        ImportError: the backend is "cuda" and the kernel is not there, or no CUDA device.
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


def convolution_runs_on(window_BSD: Tensor, taps: int) -> bool:
    """Whether `convolution_by_kernel` takes this window: 2 to 4 taps, channels in eights."""
    return runs_on(window_BSD) and 2 <= taps <= 4 and window_BSD.shape[2] % 8 == 0


def convolution_by_kernel(
    kernel: Function, window_BSD: Tensor, weight_DW: Tensor, bias_D: Tensor, episode_BS: Tensor | None
) -> Tensor:
    """`convolution.causal_convolution`'s ``y [B, T, D]`` by `causal_conv1d_fn`.

    The past inputs stand in the window as steps of their own, whose outputs are dropped: the kernel's own
    initial state cannot be told apart by episode in all its versions.
    """
    y_BDS = kernel(
        window_BSD.transpose(1, 2),
        weight_DW,
        bias_D,
        seq_idx=None if episode_BS is None else episode_BS.int(),
    )
    # Transposed first: the gradient that comes back must have its channels last, as the kernel wants it.
    return y_BDS.transpose(1, 2)[:, weight_DW.shape[1] - 1 :]
