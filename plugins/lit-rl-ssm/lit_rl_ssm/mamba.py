"""The trunk `mamba`: Mamba (Gu & Dao 2023, arXiv:2312.00752).

    x, z     = in_proj(input)
    x        = silu(conv1d(x))                            causal, depthwise, W = d_conv taps
    r, B, C  = x_proj(x),      dt = softplus(dt_proj(r))
    h_t      = exp(dt_t A) h_{t-1} + dt_t B_t x_t         A = -exp(A_log), see `selective_scan`
    y_t      = C_t h_t + D x_t
    output   = out_proj(y * silu(z))

Parameters have the names, shapes and initial values of `Mamba` in the package mamba_ssm, so weights load both
ways. Around the mixer stands the pre-norm residual of `blocks`.

Shapes: B rows, T time steps, D = d_model, E = expand * D channels, N = d_state, W = d_conv, R = dt_rank.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lit_rl.trunks import Linear, linear
from lit_rl_ssm.blocks import Mixer, ResidualTrunk, require_sizes
from lit_rl_ssm.convolution import causal_convolution
from lit_rl_ssm.kernels import CAUSAL_CONVOLUTION, kernel_for
from lit_rl_ssm.selective_scan import hidden_attention, scan_by, selective_scan
from lit_rl_ssm.softplus import softplus

DT_MIN, DT_MAX = 1e-3, 1e-1  # range of the step sizes at the start


class MambaMixer(Mixer):
    """One Mamba layer without norm and residual.

    Args:
        d_model: D.
        d_state: N, states a channel.
        d_conv: W, taps of the convolution.
        expand: channels E as a multiple of D.
        dt_rank: R, width of the bottleneck that the step sizes come from; "auto" is D / 16 rounded up.
        backend: "auto" takes the fastest way there is; "torch" tensor operations for scan and convolution;
            "cuda" demands the kernels; what they cannot take, on the CPU or in float64, goes the torch way.

    State: "conv" ``[B, E, W-1]``, the last inputs of the convolution, and "ssm" ``[B, E, N]``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        backend: Literal["auto", "torch", "cuda"] = "auto",
    ) -> None:
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"dt_rank must be auto or a number, not {dt_rank!r}")
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        require_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=rank)
        channels = expand * d_model
        super().__init__(d_model, channels)
        self.scan = scan_by(backend)
        self.convolution_kernel = kernel_for(CAUSAL_CONVOLUTION, backend)
        self.compiled = backend == "auto"
        self.in_proj = Linear(d_model, 2 * channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)
        self.x_proj = Linear(channels, rank + 2 * d_state, bias=False)
        self.dt_proj = Linear(rank, channels)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = Linear(channels, d_model, bias=False)
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
            dt_E = torch.empty(channels).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
            self.dt_proj.bias.copy_(dt_E + torch.log(-torch.expm1(-dt_E)))  # softplus of it is dt

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        channels, d_state = self.A_log.shape
        zero = self.A_log.new_zeros
        return {
            "conv": zero(batch_size, channels, self.conv1d.kernel_size[0] - 1),
            "ssm": zero(batch_size, d_state, channels).transpose(1, 2),  # laid out as the compiled scan does
        }

    def piece(
        self,
        x_BTD: Tensor,
        state: dict[str, Tensor],
        is_init_BT: Tensor,
        wanted: slice = slice(None),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_BTE, z_BTE, conv_BEP = self._convolve(x_BTD, state, is_init_BT)
        dt_BTE, B_BTN, C_BTN = self._select(x_BTE)
        A_EN = -torch.exp(self.A_log)
        y_BTE, h_BEN = selective_scan(
            x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, state["ssm"], is_init_BT, scan=self.scan
        )
        y_BTE = torch.addcmul(y_BTE[:, wanted], self.D, x_BTE[:, wanted]) * silu(z_BTE[:, wanted])
        return self.out_proj(y_BTE), {"conv": conv_BEP, "ssm": h_BEN}

    def hidden_attention(self, x_BTD: Tensor, state: dict[str, Tensor], is_init_BT: Tensor) -> Tensor:
        """``[B, E, T, T]``, see `blocks.Mixer.hidden_attention`; the heads are the channels."""
        x_BTE, _, _ = self._convolve(x_BTD, state, is_init_BT)
        dt_BTE, B_BTN, C_BTN = self._select(x_BTE)
        return hidden_attention(dt_BTE, -torch.exp(self.A_log), B_BTN, C_BTN, is_init_BT)

    def _convolve(
        self, x_BTD: Tensor, state: dict[str, Tensor], is_init_BT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x after the convolution, the gate z, and the last inputs of the convolution."""
        x_BTE, z_BTE = self.in_proj(x_BTD).chunk(2, dim=-1)
        # Autocast rounds the products; what memories are made of keeps the parameters' precision.
        x_BTE, conv_BEP = causal_convolution(
            x_BTE.to(self.A_log.dtype),
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            state["conv"],
            is_init_BT,
            kernel=self.convolution_kernel,
            compiled=self.compiled,
        )
        return x_BTE, z_BTE, conv_BEP

    def _select(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step size, input map and output map of every step."""
        rank, d_state = self.dt_proj.in_features, self.A_log.shape[1]
        r_BTR, B_BTN, C_BTN = self.x_proj(x_BTE).to(x_BTE.dtype).split([rank, d_state, d_state], dim=-1)
        # The bias is added outside the product, which autocast rounds: it decides how long channels remember.
        dt_BTE = linear(r_BTR, self.dt_proj.weight).to(x_BTE.dtype) + self.dt_proj.bias
        return softplus(dt_BTE), B_BTN, C_BTN


class Mamba(ResidualTrunk):
    """`n_layers` Mamba layers of width `d_model`, each in a pre-norm residual block.

    Args:
        in_features: F.
        d_model: width of the residual stream and of the output.
        n_layers: how many layers.
        d_state: states a channel.
        d_conv: taps of the causal convolution.
        expand: channels of a layer as a multiple of `d_model`.
        dt_rank: width of the bottleneck that the step sizes come from; "auto" is d_model / 16 rounded up.
        reset: "strict" clears the memory where `is_init` says so; "leaky" never does, so that episodes run
            into one another, as in published Mamba agents (to compare with, not to use).
        backend: "auto" takes the fastest way there is; "torch" tensor operations for scan and convolution;
            "cuda" demands the kernels; what they cannot take, on the CPU or in float64, goes the torch way.
    """

    def __init__(
        self,
        in_features: int,
        *,
        d_model: int = 128,
        n_layers: int = 1,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        reset: Literal["strict", "leaky"] = "strict",
        backend: Literal["auto", "torch", "cuda"] = "auto",
    ) -> None:
        make_mixer = partial(
            MambaMixer,
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            backend=backend,
        )
        super().__init__(in_features, make_mixer, n_layers=n_layers, reset=reset)
