"""The trunk `simple_ssm`: one diagonal, linear, time-invariant state-space layer, as a baseline.

    u_t = tanh(LayerNorm(input_proj(x_t)))
    s_t = a * s_{t-1} + B u_t,        a = exp(-softplus(a_raw))
    y_t = tanh(C s_t + D * u_t)

The frame is the simple SSM policy that DHC-Jamba-Enhanced compares with (GitHub,
benchmarks/run_mujoco_benchmark.py): hidden size 128, half of it state, Linear-LayerNorm-tanh before and
Linear-tanh after. That code has no memory at all, though: its "state update" is a second linear map of the
same step. Decided here: the recurrence that its name promises, diagonal so that it runs in parallel; a in
(0, 1), so that it is stable whatever is learned; time constants 1 / (1 - a) spread evenly in the logarithm
from 2 to 1000 steps at the start, with the rows of B scaled by sqrt(1 - a^2), which gives every state the
size of its input; the skip D; torch's own initial values for the linear maps.

The recurrence is the selective scan with one state a channel, step size 1 and nothing selected.

Shapes: B rows, T time steps, F input features, D = d_model, N = d_state.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import softplus

from lit_rl.trunks import Linear, Trunk
from lit_rl_ssm.blocks import require_sizes, resets_by
from lit_rl_ssm.selective_scan import scan_by, selective_scan

SHORTEST, LONGEST = 2.0, 1000.0  # time constants at the start, in steps


class SimpleSSM(Trunk):
    """One layer.

    Args:
        in_features: F.
        d_model: hidden and output width.
        d_state: N, how many states.
        reset: "leaky" ignores `is_init`, a common mistake kept as an option, for comparison.

    State: "s" ``[B, N]``.
    """

    def __init__(
        self,
        in_features: int,
        *,
        d_model: int = 128,
        d_state: int = 64,
        reset: Literal["strict", "leaky"] = "strict",
    ) -> None:
        require_sizes(in_features=in_features, d_model=d_model, d_state=d_state)
        super().__init__(in_features, out_features=d_model)
        self.resets = resets_by(reset)
        self.scan = scan_by("auto")
        self.input_proj = Linear(in_features, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.B = Linear(d_model, d_state, bias=False)
        self.C = Linear(d_state, d_model)
        self.D = nn.Parameter(torch.ones(d_model))
        # 1 / (1 - a) = tau means softplus(a_raw) = -log(1 - 1 / tau), hence a_raw = -log(tau - 1).
        tau_N = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), d_state)
        self.a_raw = nn.Parameter(-torch.log(tau_N - 1))
        with torch.no_grad():
            self.B.weight *= torch.sqrt(1 - (1 - 1 / tau_N) ** 2)[:, None]

    def initial_state(self, batch_size: int) -> TensorDict:
        s_BN = self.a_raw.new_zeros(batch_size, self.a_raw.shape[0])
        return TensorDict({"s": s_BN}, batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        s_BN = self.entries(x, state, is_init, {"s": self.a_raw.shape})["s"]
        # Outside autocast, as the recurrent trunks: a state rounded at every step would drift.
        with torch.autocast(x.device.type, enabled=False):
            u_BTD = torch.tanh(self.norm(self.input_proj(x.to(s_BN.dtype))))
            s_BTN, s_BN = self._scan(self.B(u_BTD), s_BN, self.resets(is_init))
            y_BTD = torch.tanh(self.C(s_BTN) + self.D * u_BTD)
        return y_BTD, TensorDict({"s": s_BN}, batch_size=state.batch_size)

    def _scan(self, write_BTN: Tensor, s_BN: Tensor, is_init_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Every state, ``[B, T, N]``, and the last."""
        log_a_N = -softplus(self.a_raw)
        if write_BTN.shape[1] == 1:
            kept_BN = s_BN.masked_fill(is_init_BT, 0)
            s_BN = torch.addcmul(write_BTN[:, 0], torch.exp(log_a_N), kept_BN)
            return s_BN[:, None], s_BN
        one_BTN = torch.ones_like(write_BTN)
        one_BT1 = one_BTN[:, :, :1]
        selected = (write_BTN, one_BTN, log_a_N[:, None], one_BT1, one_BT1)
        s_BTN, s_BN1 = selective_scan(*selected, s_BN[:, :, None], is_init_BT, scan=self.scan)
        return s_BTN, s_BN1[:, :, 0]
