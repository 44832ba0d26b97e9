"""The trunk `improved_ssm`: the improved SSM of SSM-MetaRL-Unified (GitHub, core/improved_ssm.py), no heads.

    u   = relu(input_proj(x))
    h_t = A h_{t-1} + B u_t,        z_t = LayerNorm(C h_t + D u_t)        in each layer
    u  <- z in the first layer, u + z in the others; the last u is the output

As there: the equations, A a full matrix that starts orthogonal times 0.9, Xavier-uniform B, C and input_proj,
64 states, hidden size 128, 2 layers, and no residual around the first layer.

Decided here: every layer has a state of its own. There one state is handed from layer to layer within a step,
past LayerNorm and back, which no longer is a linear recurrence of any layer. A is divided by a bound on its
spectral norm where that is above 1, so that no sequence makes the state explode (there it may; the first A is
left as it is). D starts Xavier-uniform, not with unit variance.

Shapes: B rows, T time steps, F input features, D = d_model, N = d_state, L = n_layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import relu

from lit_rl.trunks import Linear, Trunk, linear
from lit_rl_ssm.blocks import require_sizes, resets_by
from lit_rl_ssm.dense_scan import dense_scan, norm_bound

GAIN = 0.9  # of the orthogonal initial A


class ImprovedSSM(Trunk):
    """`n_layers` linear state-space layers of width `d_model` with full matrices.

    Args:
        in_features: F.
        d_model: hidden and output width.
        n_layers: how many layers.
        d_state: N, the size of each layer's state.
        layer_norm: normalise what a layer gives.
        orthogonal_init: A starts orthogonal times 0.9, else Xavier-uniform like the others.
        residual: add what a layer gets to what it gives, from the second layer on.
        reset: "leaky" ignores `is_init`, a common mistake kept as an option, for comparison.

    State: "h" ``[B, L, N]``.
    """

    def __init__(
        self,
        in_features: int,
        *,
        d_model: int = 128,
        n_layers: int = 2,
        d_state: int = 64,
        layer_norm: bool = True,
        orthogonal_init: bool = True,
        residual: bool = True,
        reset: Literal["strict", "leaky"] = "strict",
    ) -> None:
        require_sizes(in_features=in_features, d_model=d_model, n_layers=n_layers, d_state=d_state)
        super().__init__(in_features, out_features=d_model)
        self.residual = residual
        self.resets = resets_by(reset)
        self.input_proj = Linear(in_features, d_model)
        self.A = nn.Parameter(torch.empty(n_layers, d_state, d_state))
        self.B = nn.Parameter(torch.empty(n_layers, d_state, d_model))
        self.C = nn.Parameter(torch.empty(n_layers, d_model, d_state))
        self.D = nn.Parameter(torch.empty(n_layers, d_model, d_model))
        self.norms = nn.ModuleList(
            nn.LayerNorm(d_model) if layer_norm else nn.Identity() for _ in range(n_layers)
        )
        for matrix in (self.input_proj.weight, *self.A, *self.B, *self.C, *self.D):
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.input_proj.bias)
        if orthogonal_init:
            for A_NN in self.A:
                nn.init.orthogonal_(A_NN, gain=GAIN)

    def initial_state(self, batch_size: int) -> TensorDict:
        layers, d_state, _ = self.A.shape
        return TensorDict({"h": self.A.new_zeros(batch_size, layers, d_state)}, batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        is_init_BT = self.resets(is_init)
        memory_BLN = self.entries(x, state, is_init, {"h": self.A.shape[:2]})["h"]
        # Outside autocast, as the recurrent trunks: a state rounded at every step would drift.
        with torch.autocast(x.device.type, enabled=False):
            u_BTD = relu(self.input_proj(x.to(self.A.dtype)))
            A_LNN = self.A / norm_bound(self.A).clamp(min=1)
            leaving = []
            for layer, (A_NN, norm) in enumerate(zip(A_LNN, self.norms, strict=True)):
                write_BTN = linear(u_BTD, self.B[layer])
                h_BTN = _states(A_NN, write_BTN, memory_BLN[:, layer], is_init_BT)
                z_BTD = norm(linear(h_BTN, self.C[layer]) + linear(u_BTD, self.D[layer]))
                u_BTD = u_BTD + z_BTD if self.residual and layer > 0 else z_BTD
                leaving.append(h_BTN[:, -1])
        return u_BTD, TensorDict({"h": torch.stack(leaving, dim=1)}, batch_size=state.batch_size)


def _states(A_NN: Tensor, v_BTN: Tensor, h_BN: Tensor, is_init_BT: Tensor) -> Tensor:
    if v_BTN.shape[1] > 1:
        return dense_scan(A_NN, v_BTN, h_BN, is_init_BT)
    return torch.addmm(v_BTN[:, 0], h_BN.masked_fill(is_init_BT, 0), A_NN.t())[:, None]
