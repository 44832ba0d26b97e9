"""The memoryless trunk: every step is mapped alone, so resets and state mean nothing to it.

Shapes: B rows, T time steps, F input features, D output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.autograd import first_order
from lit_rl.trunks.base import Trunk
from lit_rl.trunks.linear_maps import linear

FEW = 4096  # numbers of a layer up to which torch's own tanh is as quick

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
        if self._is_fused(x):
            parameters = [p for layer in cast(Iterable[nn.Linear], self.layers) for p in layer.parameters()]
            return _TanhLayers.apply(x, *parameters), state
        # Not through the modules' calls, which cost as much as the arithmetic of one acting step.
        for layer in cast(Iterable[nn.Linear], self.layers):
            x = self.activation(linear(x, layer.weight, layer.bias))
        return x, state

    def _is_fused(self, x: Tensor) -> bool:
        """Whether `_TanhLayers` is the quicker way."""
        B, T, _ = x.shape
        if B * T * self.out_features <= FEW or self.activation is not torch.tanh:
            return False
        return x.dtype == torch.float32 and x.is_cpu and not torch.is_autocast_enabled("cpu")


class _TanhLayers(torch.autograd.Function):
    """All layers as one step of autograd, with tanh by way of the sigmoid, which torch has faster on CPUs.

    ``tanh(x) = 1 - 2 sigmoid(-2x)``, to the rounding of 1. Shapes: N = B T steps.
    """

    @staticmethod
    def forward(ctx: Any, x_BTF: Tensor, *weights_and_biases: Tensor) -> Tensor:
        weights, biases = weights_and_biases[::2], weights_and_biases[1::2]
        outputs = [x_BTF.flatten(0, 1)]
        for weight, bias in zip(weights, biases, strict=True):
            double_ND = torch.addmm(bias, outputs[-1], weight.t(), beta=-2, alpha=-2)
            outputs.append(torch.rsub(double_ND.sigmoid_(), 1, alpha=2))
        ctx.save_for_backward(*outputs, *weights)
        return outputs[-1].view(*x_BTF.shape[:2], -1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        n_layers = len(ctx.saved_tensors) // 2
        outputs, weights = ctx.saved_tensors[: n_layers + 1], ctx.saved_tensors[n_layers + 1 :]
        grad_ND = grad_BTD.flatten(0, 1)
        grads: list[Tensor] = []  # from the last layer to the first, each bias before its weight
        for layer in reversed(range(n_layers)):
            grad_ND = torch.ops.aten.tanh_backward(grad_ND, outputs[layer + 1])
            grads += [grad_ND.sum(0), grad_ND.t() @ outputs[layer]]
            if layer or ctx.needs_input_grad[0]:
                grad_ND = grad_ND @ weights[layer]
        grad_x = grad_ND.view(*grad_BTD.shape[:2], -1) if ctx.needs_input_grad[0] else None
        return grad_x, *reversed(grads)
