"""The memoryless trunk: every step is mapped alone, so resets and state mean nothing to it.

Shapes: B rows, T time steps, F input features, D output features.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.trunks.base import Trunk

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class MLP(Trunk):
    """`n_layers` linear layers of width `d_model`, each followed by the activation.

    Weights start orthogonal with gain sqrt(2), biases at zero: CleanRL's PPO.
    """

    def __init__(
        self,
        in_features: int,
        *,
        d_model: int = 64,
        n_layers: int = 2,
        activation: Literal["tanh", "relu", "silu", "gelu"] = "tanh",
    ) -> None:
        for name, size in (("n_layers", n_layers), ("d_model", d_model)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        super().__init__(in_features, out_features=d_model)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise([in_features] + [d_model] * n_layers):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.orthogonal_(linear.weight, gain=math.sqrt(2))
            nn.init.zeros_(linear.bias)
            layers += [linear, ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers)

    def initial_state(self, batch_size: int) -> TensorDict:
        return TensorDict(batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        return self.layers(x), state
