"""The trunk `mamba2`: Mamba-2 (Dao & Gu 2024, arXiv:2405.21060).

A mixer, with the state-space recurrence of `ssd` in its middle:

    z, xBC, dt = in_proj(input)
    x, B, C    = silu(conv1d(xBC))                              causal, depthwise, W = d_conv taps
    y          = ssd(x, softplus(dt + dt_bias), A, B, C, D)     A = -exp(A_log), one a head
    output     = out_proj(norm(y * silu(z)))                    RMSNorm

Parameters have the names, shapes and initial values of `Mamba2` in the package mamba_ssm with one group (its
default), so weights load both ways. Around the mixer stands the pre-norm residual of `blocks`.

Shapes: B rows, T time steps, D = d_model, E = expand * D = H * P channels, H heads, P = headdim, N = d_state,
W = d_conv.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_rl.compiled import can_be_compiled
from lit_rl.trunks import Linear
from lit_rl_ssm import kernels
from lit_rl_ssm.blocks import Mixer, ResidualTrunk, require_sizes
from lit_rl_ssm.compiled_mamba2_step import compiled_mamba2_step
from lit_rl_ssm.compiled_ssd import compiled_ssd
from lit_rl_ssm.convolution import causal_convolution
from lit_rl_ssm.norm import RMSNorm
from lit_rl_ssm.softplus import softplus
from lit_rl_ssm.ssd import LARGEST_CHUNK, attention, ssd, ssd_step

DT_MIN, DT_MAX = 1e-3, 1e-1  # range of the step sizes at the start
A_MIN, A_MAX = 1.0, 16.0  # range of the decay rates at the start


class Selected(NamedTuple):
    """What the recurrence runs on, as `ssd.ssd` takes it."""

    x_BTHP: Tensor
    dt_BTH: Tensor
    A_H: Tensor
    B_BTN: Tensor
    C_BTN: Tensor


class Mamba2Mixer(Mixer):
    """One Mamba-2 layer without norm and residual.

    Args:
        d_model: D.
        d_state: N, states of each of a head's P channels.
        d_conv: W, taps of the convolution.
        expand: channels E as a multiple of D.
        headdim: P, channels of a head; divides E.
        chunk_size: steps that tensor operations treat as one matrix; speed and memory only. The compiled loop
            of the CPU has its own.
        backend: "auto" takes the fastest way there is; "torch" tensor operations for scan and convolution;
            "cuda" demands the kernels; what they cannot take, on the CPU or in float64, goes the torch way.

    State: "conv" ``[B, E + 2N, W-1]``, the last inputs of the convolution, and "ssm" ``[B, H, P, N]``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 32,
        chunk_size: int = 16,
        backend: Literal["auto", "torch", "cuda"] = "auto",
    ) -> None:
        require_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim)
        channels = expand * d_model
        if channels % headdim:
            raise ValueError(
                f"expand * d_model = {channels} channels do not divide into heads of headdim = {headdim}: "
                "choose a headdim that divides them"
            )
        if not 1 <= chunk_size <= LARGEST_CHUNK:
            raise ValueError(f"chunk_size must be between 1 and {LARGEST_CHUNK}, not {chunk_size}")
        heads = channels // headdim
        super().__init__(d_model, channels)
        self.scan_kernel = kernels.kernel_for(kernels.CHUNK_SCAN, backend)
        self.convolution_kernel = kernels.kernel_for(kernels.CAUSAL_CONVOLUTION, backend)
        self.compiled = backend == "auto"
        self.chunk_size = chunk_size
        self.sizes = (heads, headdim, d_state)
        convolved = channels + 2 * d_state
        self.in_proj = Linear(d_model, channels + convolved + heads, bias=False)
        self.conv1d = nn.Conv1d(convolved, convolved, d_conv, groups=convolved)
        dt_H = torch.empty(heads).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        self.dt_bias = nn.Parameter(dt_H + torch.log(-torch.expm1(-dt_H)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(A_MIN, A_MAX).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(channels)
        self.out_proj = Linear(channels, d_model, bias=False)

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        convolved, _, taps = self.conv1d.weight.shape
        zero = self.A_log.new_zeros
        return {"conv": zero(batch_size, convolved, taps - 1), "ssm": zero(batch_size, *self.sizes)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor], is_init_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if x_BTD.shape[1] == 1 and not torch.is_grad_enabled():
            weights = self._step_weights()
            if self._acts_compiled(x_BTD, state, weights):
                now = (x_BTD[:, 0], state, is_init_BT[:, 0])
                y_BD, state = compiled_mamba2_step(*now, **weights, eps=self.norm.eps)
                return y_BD[:, None], state
        return super().forward(x_BTD, state, is_init_BT)

    def _step_weights(self) -> dict[str, Tensor]:
        """What `compiled_mamba2_step` reads; asked by name, which is quicker than `parameters`."""
        return {
            "in_proj": self.in_proj.weight,
            "taps_CW": self.conv1d.weight[:, 0],
            "taps_bias_C": self.conv1d.bias,
            "dt_bias_H": self.dt_bias,
            "A_log_H": self.A_log,
            "D_H": self.D,
            "norm_E": self.norm.weight,
            "out_proj": self.out_proj.weight,
        }

    def _acts_compiled(self, x_BTD: Tensor, state: dict[str, Tensor], weights: dict[str, Tensor]) -> bool:
        """Whether one call may do the step: it reads the projections' weights and calls no module or hook."""
        if any(type(projection) is not Linear for projection in (self.in_proj, self.out_proj)):
            return False
        if not self.compiled or torch.is_autocast_enabled(x_BTD.device.type):
            return False
        return can_be_compiled(x_BTD, *state.values(), *weights.values())

    def piece(
        self,
        x_BTD: Tensor,
        state: dict[str, Tensor],
        is_init_BT: Tensor,
        wanted: slice = slice(None),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        projected = self.in_proj(x_BTD)
        # Autocast rounds the products around; what memories are made of keeps the parameters' precision.
        with torch.autocast(x_BTD.device.type, enabled=False):
            z_BTE, selected, conv = self._select(projected, state, is_init_BT)
            y_BTHP, ssm = self._scan(selected, state["ssm"], is_init_BT)
            y_BTE = self.norm.gated(y_BTHP.flatten(2)[:, wanted], z_BTE[:, wanted])
        return self.out_proj(y_BTE), {"conv": conv, "ssm": ssm}

    def hidden_attention(self, x_BTD: Tensor, state: dict[str, Tensor], is_init_BT: Tensor) -> Tensor:
        """``[B, H, T, T]``, see `blocks.Mixer.hidden_attention`."""
        projected = self.in_proj(x_BTD)
        with torch.autocast(x_BTD.device.type, enabled=False):
            _, selected, _ = self._select(projected, state, is_init_BT)
            return attention(*selected[1:], is_init_BT)

    def _select(
        self, projected: Tensor, state: dict[str, Tensor], is_init_BT: Tensor
    ) -> tuple[Tensor, Selected, Tensor]:
        """The gate z, what the recurrence runs on, and the last inputs of the convolution."""
        heads, headdim, d_state = self.sizes
        channels = heads * headdim
        z_BTE, xBC, dt_BTH = projected.to(self.A_log.dtype).split(
            [channels, channels + 2 * d_state, heads], dim=2
        )
        xBC, conv = causal_convolution(
            xBC,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            state["conv"],
            is_init_BT,
            kernel=self.convolution_kernel,
            compiled=self.compiled,
        )
        x_BTE, B_BTN, C_BTN = xBC.split([channels, d_state, d_state], dim=2)
        x_BTHP = x_BTE.unflatten(2, (heads, headdim))
        dt_BTH = softplus(dt_BTH + self.dt_bias)
        return z_BTE, Selected(x_BTHP, dt_BTH, -torch.exp(self.A_log), B_BTN, C_BTN), conv

    def _scan(self, selected: Selected, ssm_BHPN: Tensor, is_init_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence by the leanest way there is."""
        x_BTHP, dt_BTH, A_H, B_BTN, C_BTN = selected
        if x_BTHP.shape[1] == 1:
            now = (x_BTHP[:, 0], dt_BTH[:, 0], A_H, B_BTN[:, 0], C_BTN[:, 0], self.D)
            y_BHP, ssm_BHPN = ssd_step(*now, ssm_BHPN, is_init_BT[:, 0])
            return y_BHP[:, None], ssm_BHPN
        if self.scan_kernel is not None and kernels.runs_on(x_BTHP):
            return kernels.chunk_scan_by_kernel(self.scan_kernel, *selected, self.D, ssm_BHPN, is_init_BT)
        if self.compiled and can_be_compiled(*selected, self.D, ssm_BHPN):
            return compiled_ssd(*selected, self.D, ssm_BHPN, is_init_BT)
        return ssd(*selected, self.D, ssm_BHPN, is_init_BT, chunk_size=self.chunk_size)


class Mamba2(ResidualTrunk):
    """`n_layers` Mamba-2 layers of width `d_model`, each in a pre-norm residual block.

    Args:
        in_features: F.
        d_model: width of the residual stream and of the output.
        n_layers: how many layers.
        d_state: states of each channel.
        d_conv: taps of the causal convolution.
        expand: channels of a layer as a multiple of `d_model`.
        headdim: channels of a head, which share a decay; divides ``expand * d_model``.
        chunk_size: steps that tensor operations treat as one matrix; speed and memory only. The compiled loop
            of the CPU has its own.
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
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 32,
        chunk_size: int = 16,
        reset: Literal["strict", "leaky"] = "strict",
        backend: Literal["auto", "torch", "cuda"] = "auto",
    ) -> None:
        make_mixer = partial(
            Mamba2Mixer,
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            headdim=headdim,
            chunk_size=chunk_size,
            backend=backend,
        )
        super().__init__(in_features, make_mixer, n_layers=n_layers, reset=reset)
