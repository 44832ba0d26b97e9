"""The trunk `mingru`: minGRU (Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, arXiv:2410.01201).

    z_t  = sigmoid(gate(x_t))
    h~_t = g(candidate(x_t)),                g(u) = u + 1/2 where u >= 0, else sigmoid(u)
    h_t  = (1 - z_t) * h_{t-1} + z_t * h~_t

Gate and candidate do not see h_{t-1}, so the recurrence is linear in h and runs in parallel over time. The
paper (appendix B) scans in log space, for which g keeps h~ positive. Here the same h comes from a scan over
pairs, which knows neither logarithm nor division, so a reset is exact: it sets 1 - z_t to 0.

Shapes: B rows, T time steps, F input features, D = d_model.
"""

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_rl.trunks import Trunk


class MinGRU(Trunk):
    """`n_layers` minGRU layers of width `d_model`, stacked as in `nn.GRU`: no norm, no residual."""

    def __init__(self, in_features: int, *, d_model: int = 128, n_layers: int = 1) -> None:
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, not {n_layers}")
        super().__init__(in_features, out_features=d_model)
        widths = [in_features] + [d_model] * (n_layers - 1)
        self.gates = nn.ModuleList(nn.Linear(width, d_model) for width in widths)
        self.candidates = nn.ModuleList(nn.Linear(width, d_model) for width in widths)

    def initial_state(self, batch_size: int) -> TensorDict:
        shape = (batch_size, len(self.gates), self.out_features)
        return TensorDict({"h": next(self.parameters()).new_zeros(shape)}, batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        h = state["h"]
        y_BTD, last = x, []
        for layer, (gate, candidate) in enumerate(zip(self.gates, self.candidates, strict=True)):
            # Under autocast the products are rounded; the memory, which adds up, keeps its own precision.
            gate_BTD, candidate_BTD = gate(y_BTD).to(h.dtype), positive(candidate(y_BTD).to(h.dtype))
            keep_BTD = torch.sigmoid(-gate_BTD).masked_fill(is_init[:, :, None], 0)
            y_BTD = linear_scan(keep_BTD, torch.sigmoid(gate_BTD) * candidate_BTD, h[:, layer])
            last.append(y_BTD[:, -1])
        return y_BTD, TensorDict({"h": torch.stack(last, dim=1)}, batch_size=state.batch_size)


def positive(u: Tensor) -> Tensor:
    """g of the paper's appendix B: continuous, increasing and positive."""
    return torch.where(u >= 0, u + 0.5, torch.sigmoid(u))


def linear_scan(keep_BTD: Tensor, write_BTD: Tensor, h_BD: Tensor) -> Tensor:
    """All h_t of ``h_t = keep_t * h_{t-1} + write_t`` in log2(T) parallel steps (Hillis & Steele 1986).

    After the pass with a given span, ``keep`` and ``write`` of step t carry h across the last ``2 * span``
    steps up to t. With keep in [0, 1] no intermediate number exceeds the result's own terms.
    """
    steps = keep_BTD.shape[1]
    span = 1
    while span < steps:
        # Before the first step stands the identity: keep 1, write 0.
        earlier_keep = pad(keep_BTD[:, :-span], (0, 0, span, 0), value=1.0)
        earlier_write = pad(write_BTD[:, :-span], (0, 0, span, 0))
        write_BTD = write_BTD + keep_BTD * earlier_write
        keep_BTD = keep_BTD * earlier_keep
        span *= 2
    return write_BTD + keep_BTD * h_BD[:, None]
