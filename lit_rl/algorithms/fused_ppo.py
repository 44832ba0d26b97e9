"""PPO's loss and its gradients without autograd, for small networks on the CPU.

Where networks are small, autograd's bookkeeping costs more than their arithmetic. The numbers are those of
`LitPPO._loss`, to rounding.

Shapes: M steps of a minibatch, P logits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_rl import keys
from lit_rl.compiled import arrays
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.fused import FusedActorCritic, fused_for_learning
from lit_rl.models.heads import Categorical

OF_ROLLOUT = (keys.ACTION, keys.LOG_PROB, keys.VALUE, keys.ADVANTAGE, keys.VALUE_TARGET)


class FusedPPOLoss:
    """Loss and gradients of a minibatch for two perceptrons and one categorical action."""

    def __init__(self, networks: FusedActorCritic, *, value_clip: float | None, value_coef: float) -> None:
        from lit_rl.compiled.losses import categorical_ppo_loss

        self._loss = categorical_ppo_loss
        self._networks = networks
        self._value_clip, self._value_coef = value_clip, value_coef

    def __call__(
        self, steps_MT: Mapping[str, Tensor], clip: float, entropy_coef: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """What `LitPPO._loss` returns, the parameters' gradients set."""
        observation_MT = steps_MT[keys.OBSERVATION]
        policy, value = self._networks.policy_layers, self._networks.value_layers
        features = self._networks.features(observation_MT.flatten(0, 1).numpy())
        policy_outputs, value_outputs = policy(features), value(features)
        old = (steps_MT[key].flatten() for key in OF_ROLLOUT)
        action, log_prob, old_value, advantage, target = arrays(*old)
        totals, log_ratio, grad_logits, grad_value = self._loss(
            policy_outputs[-1],
            value_outputs[-1].reshape(-1),
            action,
            log_prob,
            old_value,
            advantage,
            target,
            clip=clip,
            value_clip=self._value_clip,
            value_coef=self._value_coef,
            entropy_coef=entropy_coef,
        )
        policy.set_gradients(policy_outputs, grad_logits)
        value.set_gradients(value_outputs, grad_value.reshape(-1, 1))
        loss, policy_loss, value_loss, entropy = torch.from_numpy(totals).unbind()
        measured = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        return loss, measured, torch.from_numpy(log_ratio).view(observation_MT.shape[:2])


def fused_ppo_loss(
    agent: ActorCritic, rows: int, *, value_clip: float | None, value_coef: float
) -> FusedPPOLoss | None:
    """For minibatches of so many steps; None where autograd is needed, or no slower."""
    head = agent.policy
    if type(head) is not Categorical or head.is_multi:
        return None
    networks = fused_for_learning(agent, rows)
    if networks is None:
        return None
    return FusedPPOLoss(networks, value_clip=value_clip, value_coef=value_coef)
