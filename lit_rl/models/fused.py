"""Multilayer perceptrons as one compiled call, for rollouts on the CPU.

Where environments are cheap, the dozen small operations of an acting step cost as much as they do.

Shapes: N observations, F features, L layers of width D, P numbers that the head gives.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.encoder import Encoder, Flat
from lit_rl.models.heads import Categorical, Gaussian
from lit_rl.trunks import MLP, Trunk
from lit_rl.trunks.compiled import Array, can_be_compiled


class FusedNetwork:
    """A head on an `MLP`, with the weights that they have now: make one for each rollout.

    Args:
        agent: whose normalisation of observations comes before.
        trunk: with tanh or ReLU.
        head: a linear map.
    """

    def __init__(self, agent: ActorCritic, trunk: MLP, head: nn.Linear) -> None:
        from lit_rl.trunks.compiled.layers import layers_then_head

        self._call = layers_then_head
        self._normalize = agent._normalize if agent.normalized else None
        self._is_tanh = trunk.activation is torch.tanh
        layers = cast(list[nn.Linear], list(trunk.layers))
        first_FD, *inner = [layer.weight.t() for layer in layers]
        inner_LDD = torch.stack(inner) if inner else first_FD[:0, None]
        bias_LD = torch.stack([layer.bias for layer in layers])
        # Copied into the order that the loops want.
        self._weights = [_copy(t) for t in (first_FD, inner_LDD, bias_LD, head.weight, head.bias)]

    def __call__(self, observation: np.ndarray) -> Tensor:
        """What the head gives ``[N, P]`` for observations ``[N, F]``."""
        if self._normalize is not None:
            observation = self._normalize(torch.from_numpy(observation)).numpy()
        (layers, width), N = self._weights[2].shape, len(observation)
        room_LND = np.empty((layers, N, width), np.float32)
        y_NP = np.empty((N, len(self._weights[4])), np.float32)
        x_NF = np.ascontiguousarray(observation, np.float32)
        self._call(x_NF, *self._weights, self._is_tanh, room_LND, y_NP)
        return torch.from_numpy(y_NP)


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
    plain = encoder.parts[0]
    if type(plain) is not Flat or plain.event_dims != 1 or encoder.is_dict or encoder.project is not None:
        return None
    if any(type(layer) is not nn.Linear for layer in (*trunk.layers, head)):
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in (*encoder.modules(), *trunk.modules(), head)):
        return None
    weights = [*trunk.parameters(), *head.parameters()]
    if weights[0].dtype != torch.float32 or not can_be_compiled(*weights):
        return None
    return FusedNetwork(agent, trunk, cast(nn.Linear, head))


def _copy(tensor: Tensor) -> Array:
    return tensor.detach().clone(memory_format=torch.contiguous_format).numpy()
