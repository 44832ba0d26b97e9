"""Policy and value of two multilayer perceptrons by compiled calls on the CPU, for acting and for learning.

Where environments and networks are small, the dozens of small operations of an acting step or an update
cost more than their arithmetic.

Shapes: N observations, F features, P numbers that a head gives.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lit_rl.compiled import Array, arrays, can_be_compiled
from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.encoder import Encoder, Flat
from lit_rl.models.heads import Categorical, Gaussian
from lit_rl.trunks import MLP, Trunk
from lit_rl.trunks.mlp import are_layers, suit_one_core


class FusedNetwork:
    """A head on an `MLP`, with the weights that they have now: make one for each rollout.

    Weights that lie whole in memory are read where they lie, so changes in place are seen.

    Args:
        trunk: with tanh or ReLU.
        head: a linear map.
    """

    def __init__(self, trunk: MLP, head: nn.Linear) -> None:
        from lit_rl.compiled.perceptron import IDENTITY, RELU, TANH, layer_gradients, layer_of

        self._layer_of, self._layer_gradients = layer_of, layer_gradients
        code = TANH if trunk.activation is torch.tanh else RELU
        self.modules = (*cast(list[nn.Linear], list(trunk.layers)), head)
        self._layers: list[tuple[Array, Array, int]] = []
        for layer in self.modules:
            weight, bias = arrays(layer.weight.contiguous(), layer.bias)
            self._layers.append((weight, bias, IDENTITY if layer is head else code))

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


class FusedActorCritic:
    """The two networks of an `ActorCritic` whose critic shares nothing with its policy."""

    def __init__(self, agent: ActorCritic, policy: FusedNetwork, value: FusedNetwork) -> None:
        self._normalize = agent._normalize if agent.normalized else None
        self._in_features = agent.trunk.in_features
        self.policy_layers, self.value_layers = policy, value

    def policy(self, observation: np.ndarray) -> Tensor:
        """The policy's parameters ``[N, P]`` for observations ``[N, F]``."""
        return torch.from_numpy(self.policy_layers(self.features(observation))[-1])

    def value(self, observation: np.ndarray) -> Tensor:
        """Values ``[N, 1]`` of observations ``[N, F]``."""
        return torch.from_numpy(self.value_layers(self.features(observation))[-1])

    def features(self, observation: np.ndarray) -> Array:
        """What both networks are given, ``[N, F]`` in float32."""
        if self._normalize is not None:
            observation = self._normalize(torch.from_numpy(observation)).numpy()
        x = np.ascontiguousarray(observation, np.float32)
        if x.shape[1:] != (self._in_features,):
            raise UserError(
                f"an observation has shape {x.shape[1:]} where its space says ({self._in_features},): mend "
                "the environment"
            )
        return x


def fused(agent: ActorCritic) -> FusedActorCritic | None:
    """Policy and value of an agent as it is now; None where they are not two perceptrons on the CPU.

    They are in float32, without autocast, read a plain observation, and nobody listens in on them or has put
    something else in the place of a `forward`.
    """
    policy_head = agent.policy
    if type(agent) is not ActorCritic or not agent.values_can_wait or torch.is_autocast_enabled("cpu"):
        return None
    if _has_any_global_hook():
        return None
    if type(policy_head) is Categorical:
        policy = _fuse(agent, agent.encoder, agent.trunk, policy_head.logits)
    elif type(policy_head) is Gaussian:
        policy = _fuse(agent, agent.encoder, agent.trunk, policy_head.mean)
    else:
        return None
    value = _fuse(agent, agent.value_encoder, agent.value_trunk, agent.value_head)
    if policy is None or value is None or len(value.modules[-1].weight) != 1:
        return None
    return FusedActorCritic(agent, policy, value)


def fused_for_learning(agent: ActorCritic, rows: int) -> FusedActorCritic | None:
    """Like `fused`, for updates on so many steps.

    None also where autograd is watched, where a weight is frozen, shared or made of something else, and where
    a layer is so large that torch is quicker.
    """
    networks = fused(agent)
    if networks is None:
        return None
    layers = [*networks.policy_layers.modules, *networks.value_layers.modules]
    found = [id(tensor) for layer in layers for tensor in (layer.weight, layer.bias)]
    if isinstance(agent.policy, Gaussian):
        found.append(id(agent.policy.log_std))
    if len(set(found)) < len(found) or not set(found) <= set(map(id, agent.parameters())):
        return None
    if not suit_one_core(rows, [layer.weight for layer in layers]):
        return None
    if any(module._backward_hooks or module._backward_pre_hooks for module in agent.modules()):
        return None
    if agent._forward_hooks or agent._forward_pre_hooks or "forward" in vars(agent):
        return None
    if torch.is_anomaly_enabled() or "log_prob_and_entropy" in vars(agent.policy):
        return None
    for parameter in agent.parameters():
        if not parameter.requires_grad or not parameter.is_contiguous():
            return None
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return None
    return networks


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
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules):
        return None
    layers = cast(list[nn.Linear], [*trunk.layers, head])
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not are_layers(plain.out_features, weights, biases) or not can_be_compiled(*weights, *biases):
        return None
    return FusedNetwork(trunk, cast(nn.Linear, head)) if weights[0].dtype == torch.float32 else None
