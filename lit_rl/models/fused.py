"""Multilayer perceptrons as one compiled call, for rollouts on the CPU.

Where environments are cheap, the dozen small operations of an acting step are a large part of collecting.

Shapes: N observations, F features, L layers of width D, P numbers that the head gives.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from lit_rl.compiled import Array, arrays, can_be_compiled
from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.encoder import Encoder, Flat
from lit_rl.models.heads import Categorical, Gaussian
from lit_rl.trunks import MLP, Trunk
from lit_rl.trunks.mlp import are_layers


class FusedNetwork:
    """A head on an `MLP`, with the weights that they have now: make one for each rollout.

    Args:
        agent: whose normalisation of observations comes before.
        trunk: with tanh or ReLU.
        head: a linear map.
    """

    def __init__(self, agent: ActorCritic, trunk: MLP, head: nn.Linear) -> None:
        from lit_rl.compiled.perceptron import IDENTITY, RELU, TANH, layer_of

        self._layer_of = layer_of
        self.in_features = trunk.in_features
        self._normalize = agent._normalize if agent.normalized else None
        code = TANH if trunk.activation is torch.tanh else RELU
        self._layers: list[tuple[Array, Array, int]] = []
        for layer in (*cast(list[nn.Linear], list(trunk.layers)), head):
            weight, bias = arrays(layer.weight.contiguous(), layer.bias)
            self._layers.append((weight, bias, IDENTITY if layer is head else code))

    def __call__(self, observation: np.ndarray) -> Tensor:
        """What the head gives ``[N, P]`` for observations ``[N, F]``."""
        if self._normalize is not None:
            observation = self._normalize(torch.from_numpy(observation)).numpy()
        y = np.ascontiguousarray(observation, np.float32)
        if y.shape[1:] != (self.in_features,):
            raise UserError(
                f"an observation has shape {y.shape[1:]} where its space says ({self.in_features},): mend "
                "the environment"
            )
        for weight, bias, activation in self._layers:
            y = self._layer_of(y, weight, bias, activation)
        return torch.from_numpy(y)


class FusedActorCritic(NamedTuple):
    policy: FusedNetwork
    value: FusedNetwork


def fused(agent: ActorCritic) -> FusedActorCritic | None:
    """Policy and value of an agent as it is now; None where they are not two perceptrons on the CPU.

    They are in float32, without autocast, read a plain observation, and no hook listens in on them.
    """
    policy_head = agent.policy
    if type(agent) is not ActorCritic or not agent.values_can_wait or torch.is_autocast_enabled("cpu"):
        return None
    if type(policy_head) is Categorical:
        policy = _fuse(agent, agent.encoder, agent.trunk, policy_head.logits)
    elif type(policy_head) is Gaussian:
        policy = _fuse(agent, agent.encoder, agent.trunk, policy_head.mean)
    else:
        return None
    value = _fuse(agent, agent.value_encoder, agent.value_trunk, agent.value_head)
    return FusedActorCritic(policy, value) if policy is not None and value is not None else None


def _fuse(
    agent: ActorCritic, encoder: Encoder | None, trunk: Trunk | None, head: nn.Module
) -> FusedNetwork | None:
    if encoder is None or type(trunk) is not MLP or trunk.activation not in (torch.tanh, torch.relu):
        return None
    plain = encoder.parts[0] if type(encoder) is Encoder else None
    if type(plain) is not Flat or plain.event_dims != 1 or encoder.is_dict or encoder.project is not None:
        return None
    if any(type(layer) is not nn.Linear for layer in (*trunk.layers, head)):
        return None
    modules = (agent.policy, *encoder.modules(), *trunk.modules(), head)
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return None
    layers = cast(list[nn.Linear], [*trunk.layers, head])
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not are_layers(plain.out_features, weights, biases) or not can_be_compiled(*weights, *biases):
        return None
    return FusedNetwork(agent, trunk, cast(nn.Linear, head)) if weights[0].dtype == torch.float32 else None
