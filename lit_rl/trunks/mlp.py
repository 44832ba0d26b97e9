"""The memoryless trunk: every step is mapped alone, so resets and state mean nothing to it.

Shapes: B rows, T time steps, F input features, D output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.compiled import can_be_compiled
from lit_rl.linear_maps import linear
from lit_rl.trunks.base import Trunk

# Steps from which compiled loops are the quicker way, and multiplications of a layer up to which one core
# is not slower than the libraries of torch.
FEW, MOST = 32, 2**24

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
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
        self.activation = ACTIVATIONS[activation]
        layers = [nn.Linear(*sizes) for sizes in pairwise([in_features] + [d_model] * n_layers)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def initial_state(self, batch_size: int) -> TensorDict:
        return TensorDict(batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        layers = cast(list[nn.Linear], list(self.layers))
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        if self._is_compiled(x, weights, biases):
            from lit_rl.compiled.perceptron import RELU, TANH, compiled_layers

            code = TANH if self.activation is torch.tanh else RELU
            return compiled_layers(x.flatten(0, 1), weights, biases, code).view(*x.shape[:2], -1), state
        # Not through the modules' calls, which cost as much as the arithmetic of one acting step.
        for weight, bias in zip(weights, biases, strict=True):
            x = self.activation(linear(x, weight, bias))
        return x, state

    def _is_compiled(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
        """Whether loops compiled by numba are the quicker way, and can be."""
        if self.activation not in (torch.tanh, torch.relu) or torch.is_autocast_enabled("cpu"):
            return False
        if x.ndim != 3 or x.shape[0] * x.shape[1] < FEW:
            return False
        if not are_layers(x.shape[2], weights, biases) or not suit_one_core(x.shape[0] * x.shape[1], weights):
            return False
        return can_be_compiled(x, *weights, *biases)


def suit_one_core(steps: int, weights: Sequence[Tensor]) -> bool:
    """Whether so many steps through these weights are no slower in loops than in the libraries of torch."""
    return steps * max(weight.numel() for weight in weights) <= MOST


def are_layers(in_features: int, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> bool:
    """Whether weights ``[D, F]`` and biases ``[D]`` fit one another: compiled loops check no shape."""
    width = in_features
    for weight, bias in zip(weights, biases, strict=True):
        if weight is None or bias is None or weight.ndim != 2 or weight.shape[1] != width:
            return False
        width = weight.shape[0]
        if bias.shape != (width,):
            return False
    return True
