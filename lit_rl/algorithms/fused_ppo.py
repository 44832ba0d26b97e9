"""PPO's loss and its gradients without autograd, for small networks on the CPU.

Where networks are small, autograd's bookkeeping costs more than their arithmetic. The numbers are those of
`LitPPO._loss`, to rounding.

Shapes: M sequences of T steps a minibatch, N = M T; P numbers that the policy gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lit_rl import keys
from lit_rl.compiled import Array, arrays, can_be_compiled
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.fused import FusedActorCritic, fused_for_learning
from lit_rl.models.heads import Categorical, Gaussian, PolicyHead

OF_ROLLOUT = (keys.LOG_PROB, keys.VALUE, keys.ADVANTAGE, keys.VALUE_TARGET)


class FusedDistribution(Protocol):
    """A policy's distribution over actions."""

    def terms(self, params: Array, action: Array) -> tuple[Array, Array]:
        """Log-probabilities and entropies ``[N]`` of parameters ``[N, P]``."""

    def gradient(self, grad_log_prob: Array, grad_entropy: Array) -> Array:
        """That of the parameters ``[N, P]`` of the last `terms`; sets those of weights of its own."""


class FusedCategorical:
    def __init__(self) -> None:
        from lit_rl.compiled.losses import categorical_gradient, categorical_terms

        self._terms, self._gradient = categorical_terms, categorical_gradient

    def terms(self, params: Array, action: Array) -> tuple[Array, Array]:
        log_p, log_prob, entropy = self._terms(params, action)
        self._kept = log_p, action, entropy
        return log_prob, entropy

    def gradient(self, grad_log_prob: Array, grad_entropy: Array) -> Array:
        return self._gradient(*self._kept, grad_log_prob, grad_entropy)


class FusedGaussian:
    """Not squashed."""

    def __init__(self, head: Gaussian) -> None:
        from lit_rl.compiled.losses import gaussian_gradients, gaussian_terms

        self._terms, self._gradients = gaussian_terms, gaussian_gradients
        self._head = head
        (self._log_std,) = arrays(head.log_std)

    def terms(self, params: Array, action: Array) -> tuple[Array, Array]:
        self._z, log_prob, entropy = self._terms(params, self._log_std, action)
        return log_prob, entropy

    def gradient(self, grad_log_prob: Array, grad_entropy: Array) -> Array:
        grad_mean, grad_log_std = self._gradients(self._z, self._log_std, grad_log_prob, grad_entropy)
        self._head.log_std.grad = torch.from_numpy(grad_log_std)
        return grad_mean


class FusedPPOLoss:
    """Loss and gradients of a minibatch, where policy and value are two perceptrons."""

    def __init__(
        self,
        networks: FusedActorCritic,
        distribution: FusedDistribution,
        *,
        value_clip: float | None,
        value_coef: float,
    ) -> None:
        from lit_rl.compiled.losses import ppo_loss_and_gradients

        self._loss = ppo_loss_and_gradients
        self._networks, self._distribution = networks, distribution
        self._value_clip, self._value_coef = value_clip, value_coef

    def __call__(
        self, steps_MT: Mapping[str, Tensor], clip: float, entropy_coef: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """What `LitPPO._loss` returns, the parameters' gradients set."""
        observation_MT, action_MT = steps_MT[keys.OBSERVATION], steps_MT[keys.ACTION]
        policy, critic = self._networks.policy_layers, self._networks.value_layers
        features = self._networks.features(observation_MT.flatten(0, 1).numpy())
        policy_outputs, critic_outputs = policy(features), critic(features)

        log_prob, entropy = self._distribution.terms(policy_outputs[-1], action_MT.flatten(0, 1).numpy())
        totals, log_ratio, grad_log_prob, grad_value = self._loss(
            log_prob,
            critic_outputs[-1].reshape(-1),
            entropy,
            *arrays(*(steps_MT[key].flatten() for key in OF_ROLLOUT)),
            clip=clip,
            value_clip=self._value_clip,
            value_coef=self._value_coef,
            entropy_coef=entropy_coef,
        )
        grad_entropy = np.full_like(entropy, -entropy_coef / len(entropy))
        policy.set_gradients(policy_outputs, self._distribution.gradient(grad_log_prob, grad_entropy))
        critic.set_gradients(critic_outputs, grad_value.reshape(-1, 1))

        loss, policy_loss, value_loss, mean_entropy = torch.from_numpy(totals).unbind()
        measured = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": mean_entropy}
        return loss, measured, torch.from_numpy(log_ratio).view(action_MT.shape[:2])


def fused_ppo_loss(
    agent: ActorCritic, rows: int, *, value_clip: float | None, value_coef: float
) -> FusedPPOLoss | None:
    """For minibatches of so many steps; None where autograd is needed, or no slower."""
    networks = fused_for_learning(agent, rows)
    distribution = _distribution(agent.policy)
    if distribution is None or networks is None:
        return None
    return FusedPPOLoss(networks, distribution, value_clip=value_clip, value_coef=value_coef)


def _distribution(head: PolicyHead) -> FusedDistribution | None:
    if type(head) is Categorical and not head.is_multi:
        return FusedCategorical()
    if type(head) is not Gaussian or head.squash or not can_be_compiled(head.log_std, head.mean.weight):
        return None
    if head.log_std.shape != (head.num_params,) or head.mean.out_features != head.num_params:
        return None
    return FusedGaussian(head)
