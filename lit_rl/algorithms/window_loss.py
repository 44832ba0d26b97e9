"""One update of deep Q-learning on windows: targets, loss, priorities, from top to bottom in `WindowLoss`.

Shapes: M windows a batch, L steps learnt from, T = L + n with those that only bootstrap, A actions, Z numbers
an action (`QHead`), D latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl import keys
from lit_rl.data.window_replay import Drawn
from lit_rl.models.q_network import QNetwork
from lit_rl.returns import n_step

LEAST_PRIORITY = 1e-6  # no window is lost for good


@dataclass(frozen=True)
class WindowLoss:
    """What `LitDQN` descends; its fields are options of that."""

    window: int
    burn_in: int
    loss_steps: int
    n_step: int
    gamma: float
    double: bool
    priority_eta: float
    latents: bool
    latent_priority: float
    latent_targets: bool

    def __call__(
        self, agent: QNetwork, target: QNetwork, drawn: Drawn
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss of a batch; new priorities ``[M]``; what was measured. The last two without gradient."""
        # A plain dictionary: looking into a TensorDict costs as much as a small operation.
        steps_MT = dict(drawn.windows[keys.STEPS].items())
        action, reward = steps_MT[keys.ACTION], steps_MT[keys.REWARD]
        terminated, has_action = steps_MT[keys.TERMINATED], steps_MT[keys.HAS_ACTION]
        start = self.burn_in
        learnt, to_come = slice(start, self.window), slice(start + 1, None)
        stored_M, head = drawn.windows.get(keys.TRUNK_STATE, None), agent.head
        if agent.is_memoryless:
            # Only what learns needs a gradient, and nothing bootstraps from the first step.
            out_MLAZ, latent_MLD = self._pass(agent, steps_MT, None, learnt)
            auxiliary = agent.auxiliary_loss()
            with torch.no_grad():
                target_MTAZ, _ = self._pass(target, steps_MT, None, to_come)
                judge_MTAZ = target_MTAZ
                if self.double:
                    judge_MTAZ, _ = self._pass(agent, steps_MT, None, to_come)
        else:
            # One pass: what follows is little, and a second one costs more than the gradient of that.
            out_MTAZ, latent_MTD = self._pass(agent, steps_MT, stored_M, slice(start, None))
            auxiliary = agent.auxiliary_loss()
            out_MLAZ, latent_MLD = (part[:, : self.window - start] for part in (out_MTAZ, latent_MTD))
            with torch.no_grad():
                target_MTAZ = self._pass(target, steps_MT, stored_M, slice(start, None))[0][:, 1:]
                judge_MTAZ = out_MTAZ.detach()[:, 1:] if self.double else target_MTAZ
        with torch.no_grad():
            best_MTZ = _of_action(target_MTAZ, head.values(judge_MTAZ).argmax(-1))
            ahead = n_step(
                reward[:, start:],
                terminated[:, start:],
                has_action[:, start:],
                n=self.n_step,
                gamma=self.gamma,
            )
            at_ML1 = (ahead.at - 1).clamp_min(0).unsqueeze(-1)  # among the steps to come
            bootstrap_MLZ = best_MTZ.gather(1, at_ML1.expand(-1, -1, best_MTZ.shape[-1]))
        predicted_MLZ = _of_action(out_MLAZ, action[:, learnt])
        loss_ML = head.loss(predicted_MLZ, ahead.reward, ahead.discount, bootstrap_MLZ)

        counts_ML = has_action[:, learnt].clone()
        counts_ML[:, : self.window - start - self.loss_steps] = False
        weight_ML = counts_ML * drawn.weight.unsqueeze(-1)
        loss = (loss_ML * weight_ML).sum() / counts_ML.sum()
        with torch.no_grad():
            value_ML = head.values(predicted_MLZ)
            td_target_ML = ahead.reward + ahead.discount * head.values(bootstrap_MLZ)
            td_error_ML = (td_target_ML - value_ML).abs() * counts_ML
            count_M = counts_ML.sum(1)
            mean_M = td_error_ML.sum(1) / count_M
            priority_M = self.priority_eta * td_error_ML.amax(1) + (1 - self.priority_eta) * mean_M
            measured = {
                "td_loss": loss.detach(),
                "td_error": mean_M.mean(),
                "q": (value_ML * counts_ML).sum() / count_M.sum(),
            }
            if self.latents:
                stored_MLD = steps_MT[keys.LATENT][:, learnt]
                drift_ML = (latent_MLD.float() - stored_MLD).norm(dim=-1) * counts_ML
                drift_M = drift_ML.sum(1) / count_M
                priority_M = (1 - self.latent_priority) * priority_M + self.latent_priority * drift_M
                q_now = head.values(out_MLAZ)
                q_stored = head.values(agent.of_latent(stored_MLD))
                largest_M1 = q_now.amax((1, 2)).abs().clamp_min(1e-8).unsqueeze(1)
                delta_q_ML = (q_now - q_stored).norm(dim=-1) / largest_M1
                measured["drift"] = drift_M.mean()
                measured["delta_q"] = (delta_q_ML * counts_ML).sum() / count_M.sum()
        if auxiliary is not None:
            loss = loss + auxiliary
            measured["auxiliary_loss"] = auxiliary.detach()
        return loss, priority_M + LEAST_PRIORITY, measured

    def _pass(
        self, network: QNetwork, steps_MT: Mapping[str, Any], stored_M: TensorDict | None, passed: slice
    ) -> tuple[Tensor, Tensor]:
        """Head outputs ``[M, .., A, Z]`` and latents of the steps `passed`, which lie behind burn-in."""
        observation, is_init = steps_MT[keys.OBSERVATION], steps_MT[keys.IS_INIT]
        state_M = network.trunk.initial_state(len(is_init)) if stored_M is None else stored_M
        if self.burn_in and not network.is_memoryless:
            with torch.no_grad():
                _, _, state_M = network(observation[:, : self.burn_in], state_M, is_init[:, : self.burn_in])
        from_latents = self.latent_targets and passed.stop is None
        if from_latents:
            passed = slice(passed.start, self.window)
        out_MTAZ, latent_MTD, _ = network(observation[:, passed], state_M, is_init[:, passed])
        if from_latents:
            with torch.no_grad():
                ahead_MnAZ = network.of_latent(steps_MT[keys.LATENT][:, self.window :])
            out_MTAZ = torch.cat([out_MTAZ, ahead_MnAZ], 1)
        return out_MTAZ, latent_MTD


def _of_action(out_MTAZ: Tensor, action_MT: Tensor) -> Tensor:
    """The numbers ``[M, T, Z]`` of the given actions."""
    index = action_MT[..., None, None].expand(-1, -1, 1, out_MTAZ.shape[-1])
    return out_MTAZ.gather(2, index).squeeze(2)
