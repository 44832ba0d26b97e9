"""Agents whose networks are multilayer perceptrons, by compiled calls on the CPU, to act and to learn.

Where environments and networks are small, the dozens of small operations of an acting step or an update
cost more than their arithmetic.

Shapes: N observations, F features, P numbers that a head gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lit_rl.compiled import Array, arrays, can_be_compiled
from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.agent import Agent
from lit_rl.models.encoder import Encoder, Flat
from lit_rl.models.heads import Categorical, Gaussian
from lit_rl.models.q_heads import ExpectedQ
from lit_rl.models.q_network import QNetwork
from lit_rl.trunks import MLP, Linear, Trunk
from lit_rl.trunks.mlp import are_layers, suit_one_core

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class FusedNetwork:
    """A head on an `MLP`, with the weights that they have now: make one for each rollout or turn of
    learning.

    Weights that lie whole in memory are read where they lie, so changes in place are seen.

    Args:
        projection: a linear map before the trunk, with ReLU; or none.
        trunk: with tanh or ReLU.
        head: a linear map.
    """

    def __init__(self, projection: Sequence[nn.Linear], trunk: MLP, head: nn.Linear) -> None:
        from lit_rl.compiled.perceptron import IDENTITY, RELU, TANH, layer_gradients, layer_of

        self._layer_of, self._layer_gradients = layer_of, layer_gradients
        in_trunk = cast(list[nn.Linear], list(trunk.layers))
        of_trunk = TANH if trunk.activation is torch.tanh else RELU
        self.modules = (*projection, *in_trunk, head)
        activations = (*[RELU] * len(projection), *[of_trunk] * len(in_trunk), IDENTITY)
        self._layers: list[tuple[Array, Array, int]] = []
        for layer, activation in zip(self.modules, activations, strict=True):
            weight, bias = arrays(layer.weight.contiguous(), layer.bias)
            self._layers.append((weight, bias, activation))

    def __call__(self, x: Array) -> list[Array]:
        """`x` ``[N, F]`` and what each layer makes of it, the head's ``[N, P]`` last."""
        outputs = [x]
        for weight, bias, activation in self._layers:
            outputs.append(self._layer_of(outputs[-1], weight, bias, activation))
        return outputs

    def set_gradients(self, outputs: list[Array], grad: Array) -> None:
        """Of all weights and biases, from the `outputs` of a call and the gradient of the last of them."""
        for k in reversed(range(len(self._layers))):
            (weight, _, activation), (x, y) = self._layers[k], outputs[k : k + 2]
            step = (grad, x, y, weight, activation)
            grad, grad_weight, grad_bias = self._layer_gradients(*step, wants_x=k > 0)
            self.modules[k].weight.grad = torch.from_numpy(grad_weight)
            self.modules[k].bias.grad = torch.from_numpy(grad_bias)


class Features:
    """What an agent's networks are given, ``[N, F]`` in float32, of observations ``[N, F]``."""

    def __init__(self, agent: Agent) -> None:
        self._normalize = agent._normalize if agent.normalized else None
        self._in_features = agent.encoder.parts[0].out_features

    def __call__(self, observation: np.ndarray) -> Array:
        if self._normalize is not None:
            observation = self._normalize(torch.from_numpy(observation)).numpy()
        x = np.ascontiguousarray(observation, np.float32)
        if x.shape[1:] != (self._in_features,):
            raise UserError(
                f"an observation has shape {x.shape[1:]} where its space says ({self._in_features},): mend "
                "the environment"
            )
        return x


class FusedActorCritic:
    """The two networks of an `ActorCritic` whose critic shares nothing with its policy."""

    def __init__(self, agent: ActorCritic, policy: FusedNetwork, value: FusedNetwork) -> None:
        self.features = Features(agent)
        self.policy_layers, self.value_layers = policy, value

    def policy(self, observation: np.ndarray) -> Tensor:
        """The policy's parameters ``[N, P]`` for observations ``[N, F]``."""
        return torch.from_numpy(self.policy_layers(self.features(observation))[-1])

    def value(self, observation: np.ndarray) -> Tensor:
        """Values ``[N, 1]`` of observations ``[N, F]``."""
        return torch.from_numpy(self.value_layers(self.features(observation))[-1])


class FusedQNetwork:
    """A `QNetwork` whose trunk is an `MLP` and whose head one linear map."""

    def __init__(self, agent: QNetwork, layers: FusedNetwork) -> None:
        self.features = Features(agent)
        self.layers = layers

    def __call__(self, observation: np.ndarray) -> tuple[Tensor, Tensor]:
        """Latents ``[N, D]`` and action values ``[N, A]`` of observations ``[N, F]``."""
        *_, latent, values = self.layers(self.features(observation))
        return torch.from_numpy(latent), torch.from_numpy(values)


def fused(agent: ActorCritic, rows: int = 1) -> FusedActorCritic | None:
    """Policy and value of an agent as it is now, for so many observations at once.

    None where they are not two perceptrons on the CPU, or a layer is so large that torch is quicker. They are
    in float32, without autocast, read a plain observation, and nobody listens in on them or has put something
    else in the place of a method of theirs.
    """
    policy_head = agent.policy
    if type(agent) is not ActorCritic or not agent.values_can_wait:
        return None
    if _is_changed(agent) or _is_changed(policy_head):
        return None
    if type(policy_head) is Categorical:
        policy = _fuse(agent.encoder, agent.trunk, policy_head.logits, rows)
    elif type(policy_head) is Gaussian:
        policy = _fuse(agent.encoder, agent.trunk, policy_head.mean, rows)
    else:
        return None
    value = _fuse(agent.value_encoder, agent.value_trunk, agent.value_head, rows)
    if policy is None or value is None or len(value.modules[-1].weight) != 1:
        return None
    return FusedActorCritic(agent, policy, value)


def fused_for_learning(agent: ActorCritic, rows: int) -> FusedActorCritic | None:
    """Like `fused`, for updates on so many steps.

    None also where autograd is watched, and where a weight is frozen, shared or made of something else.
    """
    networks = fused(agent, rows)
    if networks is None:
        return None
    others = [agent.policy.log_std] if isinstance(agent.policy, Gaussian) else []
    learns = _can_learn(agent, (networks.policy_layers, networks.value_layers), others)
    return networks if learns else None


def fused_q(agent: QNetwork, rows: int = 1) -> FusedQNetwork | None:
    """Latents and action values of an agent as it is now, for so many observations at once.

    None for the reasons of `fused`, and where the head is more than one linear map or gives more than the
    expected return.
    """
    head = agent.head
    if type(agent) is not QNetwork or type(head) is not ExpectedQ or _is_changed(agent) or _is_changed(head):
        return None
    if head.hidden is not None or head.state_value is not None or len(head.last.weight) != agent.num_actions:
        return None
    layers = _fuse(agent.encoder, agent.trunk, head.last, rows)
    return None if layers is None else FusedQNetwork(agent, layers)


def fused_q_for_learning(agent: QNetwork, rows: int) -> FusedQNetwork | None:
    """Like `fused_q`, for updates on so many steps; None also for the reasons of `fused_for_learning`."""
    network = fused_q(agent, rows)
    return network if network is not None and _can_learn(agent, (network.layers,)) else None


def _can_learn(agent: Agent, networks: Sequence[FusedNetwork], others: Sequence[Tensor] = ()) -> bool:
    """Whether the networks' weights and `others` are all that learns, and nobody watches."""
    layers = [layer for network in networks for layer in network.modules]
    found = [id(tensor) for layer in layers for tensor in (layer.weight, layer.bias)]
    found += map(id, others)
    parameters = list(agent.parameters())
    if len(set(found)) < len(found) or set(found) != set(map(id, parameters)):
        return False
    if any(module._backward_hooks or module._backward_pre_hooks for module in agent.modules()):
        return False
    if torch.is_anomaly_enabled():
        return False
    return all(
        parameter.requires_grad
        and parameter.is_contiguous()
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
        for parameter in parameters
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether somebody listens in on it, or has put something else in the place of a method."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return any(hasattr(type(module), name) for name in vars(module).keys() - _OF_EVERY_MODULE)


def _fuse(encoder: Encoder | None, trunk: Trunk | None, head: nn.Module, rows: int) -> FusedNetwork | None:
    if torch.is_autocast_enabled("cpu") or _has_any_global_hook():
        return None
    if encoder is None or type(trunk) is not MLP or trunk.activation not in (torch.tanh, torch.relu):
        return None
    plain = encoder.parts[0] if type(encoder) is Encoder else None
    if type(plain) is not Flat or plain.event_dims != 1 or encoder.is_dict:
        return None
    project = encoder.project
    kinds = [] if project is None else [type(project), *map(type, project.children())]
    if kinds not in ([], [nn.Sequential, Linear, nn.ReLU]):
        return None
    projection = [] if project is None else [project[0]]
    layers = cast(list[nn.Linear], [*projection, *trunk.layers, head])
    if any(type(layer) not in (nn.Linear, Linear) for layer in layers):
        return None
    if any(map(_is_changed, (*encoder.modules(), *trunk.modules(), head))):
        return None
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not are_layers(plain.out_features, weights, biases) or not can_be_compiled(*weights, *biases):
        return None
    if weights[0].dtype != torch.float32 or not suit_one_core(rows, weights):
        return None
    return FusedNetwork(layers[: len(projection)], trunk, cast(nn.Linear, head))
