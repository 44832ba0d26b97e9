"""One update of deep Q-learning on windows: the three steps of `WindowLoss`, from top to bottom.

`lesson` is what stands still while the target network does: what that says of the windows, n-step rewards,
weights. It is made for several batches at once, which costs little more than one. `predict` is the pass that
learns, and the loss; of a small MLP `lit_rl.algorithms.fused_dqn` says the same without autograd. `judge`
measures afterwards how far off it was, and gives new priorities.

Shapes: M windows of W steps, of which the last L have a loss and the others only lead up to them; n steps
behind the window, which only bootstrap; T steps of a pass; A actions, Z numbers an action (`QHead`), D
latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl import keys
from lit_rl.compiled import can_be_compiled
from lit_rl.data.window_replay import Drawn
from lit_rl.models.encoder import Observation
from lit_rl.models.q_heads import ExpectedQ, QHead, half_squared, huber
from lit_rl.models.q_network import QNetwork
from lit_rl.returns import n_step

LEAST_PRIORITY = 1e-6  # no window is lost for good


class Seen(NamedTuple):
    """What a network passes over, M windows of T steps."""

    observation: Observation
    """``[M, T, ...]``"""
    is_init: Tensor
    """``[M, T]``"""
    state: TensorDict | None
    """the trunk's memory before the first step, ``[M]``; each network's initial one if None"""
    latent: Tensor | None
    """``[M, T, D]`` of the time of acting, where it is kept"""

    def split(self, size: int) -> list[Seen]:
        return [Seen(*part) for part in _split_each(self, size)]


class Lesson(NamedTuple):
    """What M windows are to teach."""

    seen: Seen
    action: Tensor
    """``[M, L]``, of the steps with a loss, like what follows"""
    reward: Tensor
    """summed up to the step that the target bootstraps from"""
    discount: Tensor
    """of the value there, 0 where nothing bootstraps"""
    at: Tensor
    """where that is, counted from the second step with a loss"""
    counts: Tensor
    """bool, whether the step counts: an action was taken"""
    weight: Tensor
    """its importance weight, 0 where it does not count"""
    target: Tensor
    """what the target network says from the second step on, ``[M, L + n - 1, A, Z]``"""
    bootstrap: Tensor | None
    """the numbers ``[M, L, Z]`` that the target rests on; None if the online network has yet to choose"""

    def split(self, size: int) -> list[Lesson]:
        """Batches of so many windows."""
        return [Lesson(*part) for part in _split_each(self, size)]


class Prediction(NamedTuple):
    """What the online network said of a lesson."""

    loss: Tensor
    """with gradient, like the next, where autograd made it; nothing else has one"""
    auxiliary: Tensor | None
    """what the trunk asks for beside it"""
    predicted: Tensor
    """of the actions taken, ``[M, L, Z]``"""
    bootstrap: Tensor
    """what the target rested on, ``[M, L, Z]``"""
    drift: Tensor | None
    """distance of the latents from the stored ones, ``[M, L]``, where these are kept"""
    delta_q: Tensor | None
    """R2D2's Delta-Q of them, ``[M, L]``"""


@dataclass(frozen=True)
class WindowLoss:
    """What `LitDQN` descends; its fields are options of that.

    Without a memory nothing passes over the steps before those with a loss. With an empty one at a window's
    start (``context: window``) values to bootstrap from are of a window, too, one n steps later: they see as
    many steps as those that learn from them, at most what acting sees, because nothing is ever learnt of
    longer windows; n - k fewer where a truncation leaves k < n steps to bootstrap over. (If L + n - 1 steps
    are more than a window, it begins only W - L + 1 steps later, so as to hold all ends of episodes.) A
    memory that is `stored` goes on through the window and the n steps behind. Where stored latents stand for
    these n (`latent_targets`), values within the window are of its own start.
    """

    window: int
    context: Literal["window", "stored"]
    burn_in: int
    loss_steps: int
    n_step: int
    gamma: float
    double: bool
    priority_eta: float
    priority_clip: float
    latents: bool
    latent_priority: float
    latent_targets: bool

    @torch.no_grad()
    def lesson(self, target: QNetwork, drawn: Drawn) -> Lesson:
        """What the drawn windows are to teach, as long as the target network is what it is."""
        # A plain dictionary: looking into a TensorDict costs as much as a small operation.
        steps: dict[str, Any] = dict(drawn.windows[keys.STEPS].items())
        state = drawn.windows.get(keys.TRUNK_STATE, None)
        seen = Seen(steps[keys.OBSERVATION], steps[keys.IS_INIT], state, steps.get(keys.LATENT))
        first = self.window - self.loss_steps
        behind, learnt = slice(first, None), slice(first, self.window)
        has_action = steps[keys.HAS_ACTION]
        reward, at, discount = n_step(
            steps[keys.REWARD][:, behind],
            steps[keys.TERMINATED][:, behind],
            has_action[:, behind],
            n=self.n_step,
            gamma=self.gamma,
        )
        at = (at - 1).clamp_min(0)
        counts = has_action[:, learnt]
        weight = counts * drawn.weight.unsqueeze(-1)
        target_MTAZ, _ = self._pass(target, seen, self.loss_steps + self.n_step - 1)  # not of the first step
        bootstrap = None if self.double else best(target_MTAZ, target_MTAZ, at, target.head)
        action = steps[keys.ACTION][:, learnt]
        return Lesson(seen, action, reward, discount, at, counts, weight, target_MTAZ, bootstrap)

    def predict(self, agent: QNetwork, lesson: Lesson) -> Prediction:
        """The pass that learns."""
        seen, head, L = lesson.seen, agent.head, self.loss_steps
        if self.double and not agent.is_memoryless and not self._bootstraps_later_window:
            # One pass: what follows is little, and a second one costs more than the gradient of that.
            out_MTAZ, latent_MTD = self._pass(agent, seen, L + self.n_step)
            auxiliary = agent.auxiliary_loss()
            out_MLAZ, latent_MLD, online_MTAZ = out_MTAZ[:, :L], latent_MTD[:, :L], out_MTAZ.detach()[:, 1:]
        else:
            out_MLAZ, latent_MLD = self._pass(agent, seen, L, ahead=False)
            auxiliary = agent.auxiliary_loss()
            if self.double:
                with torch.no_grad():
                    online_MTAZ, _ = self._pass(agent, seen, L + self.n_step - 1)
        bootstrap_MLZ = lesson.bootstrap
        if bootstrap_MLZ is None:
            bootstrap_MLZ = best(lesson.target, online_MTAZ, lesson.at, head)
        loss, predicted_MLZ = _loss(head, lesson, out_MLAZ, bootstrap_MLZ)
        drift_ML = delta_q_ML = None
        if seen.latent is not None:
            with torch.no_grad():
                stored_MLD = seen.latent[:, self.window - L : self.window]
                drift_ML = (latent_MLD.float() - stored_MLD).norm(dim=-1)
                q_now, q_stored = head.values(out_MLAZ), head.values(agent.of_latent(stored_MLD))
                largest_M1 = q_now.amax((1, 2)).abs().clamp_min(1e-8).unsqueeze(1)
                delta_q_ML = (q_now - q_stored).norm(dim=-1) / largest_M1
        return Prediction(loss, auxiliary, predicted_MLZ, bootstrap_MLZ, drift_ML, delta_q_ML)

    @torch.no_grad()
    def judge(
        self, head: QHead, lesson: Lesson, predictions: Sequence[Prediction]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New priorities ``[M]`` of the windows, and what was measured, from predictions of its batches."""
        predicted_MLZ = torch.cat([prediction.predicted for prediction in predictions])
        bootstrap_MLZ = torch.cat([prediction.bootstrap for prediction in predictions])
        counts_ML, count_M = lesson.counts, lesson.counts.sum(1)
        value_ML = head.values(predicted_MLZ)
        td_target_ML = lesson.reward + lesson.discount * head.values(bootstrap_MLZ)
        td_error_ML = (td_target_ML - value_ML).abs() * counts_ML
        clipped_ML = td_error_ML.clamp_max(self.priority_clip)
        mean_M = clipped_ML.sum(1) / count_M
        priority_M = self.priority_eta * clipped_ML.amax(1) + (1 - self.priority_eta) * mean_M
        measured = {
            "td_loss": torch.stack([prediction.loss for prediction in predictions]).mean(),
            "td_error": (td_error_ML.sum(1) / count_M).mean(),
            "q": (value_ML * counts_ML).sum() / count_M.sum(),
        }
        drifts = [prediction.drift for prediction in predictions if prediction.drift is not None]
        deltas = [prediction.delta_q for prediction in predictions if prediction.delta_q is not None]
        auxiliary = [prediction.auxiliary for prediction in predictions if prediction.auxiliary is not None]
        if drifts:
            drift_ML, delta_q_ML = torch.cat(drifts), torch.cat(deltas)
            drift_M = (drift_ML * counts_ML).sum(1) / count_M
            priority_M = (1 - self.latent_priority) * priority_M + self.latent_priority * drift_M
            measured["drift"] = drift_M.mean()
            measured["delta_q"] = (delta_q_ML * counts_ML).sum() / count_M.sum()
        if auxiliary:
            measured["auxiliary_loss"] = torch.stack(auxiliary).mean()
        return priority_M + LEAST_PRIORITY, measured

    @property
    def _bootstraps_later_window(self) -> bool:
        return self.context == "window" and not self.latent_targets

    def _pass(
        self, network: QNetwork, seen: Seen, steps: int, *, ahead: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Head outputs ``[M, steps, A, Z]`` of the last `steps`, and their latents.

        The last of the window, or of that and the n steps behind it if `ahead`. Where stored latents stand
        for these n, only the window's are returned.
        """
        if ahead and self.latent_targets:
            assert seen.latent is not None
            with torch.no_grad():
                to_come_MnAZ = network.of_latent(seen.latent[:, self.window :])
            if steps == self.n_step:  # none of the window
                return to_come_MnAZ, seen.latent[:, :0]
            out_MTAZ, latent_MTD = self._pass(network, seen, steps - self.n_step, ahead=False)
            return torch.cat([out_MTAZ, to_come_MnAZ], 1), latent_MTD
        stop, state_M = self.window + self.n_step if ahead else self.window, seen.state
        if state_M is None:
            state_M = network.trunk.initial_state(len(seen.is_init))
        if network.is_memoryless:
            start = stop - steps
        elif ahead and self._bootstraps_later_window:
            start = min(self.n_step, stop - steps)  # earlier where an episode may be cut off before that
        else:
            start = self.burn_in
            if start:
                with torch.no_grad():
                    _, _, state_M = network(seen.observation[:, :start], state_M, seen.is_init[:, :start])
        passed = slice(start, stop)
        return network.last_steps(seen.observation[:, passed], state_M, seen.is_init[:, passed], steps)


def _loss(head: QHead, lesson: Lesson, out_MLAZ: Tensor, bootstrap_MLZ: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the steps that count; without gradient, the numbers ``[M, L, Z]`` of the actions taken."""
    floats = (lesson.reward, lesson.discount, bootstrap_MLZ, lesson.weight)
    is_plain = type(head) is ExpectedQ and "loss" not in vars(head) and head.error in (huber, half_squared)
    is_plain = is_plain and all(tensor.shape[:2] == lesson.counts.shape for tensor in (out_MLAZ, *floats))
    if is_plain and can_be_compiled(out_MLAZ, *floats):
        from lit_rl.compiled.losses import compiled_td_loss

        is_clipped = head.error is huber
        return compiled_td_loss(out_MLAZ, lesson.action, *floats, lesson.counts, is_clipped=is_clipped)
    predicted_MLZ = _of_action(out_MLAZ, lesson.action)
    loss_ML = head.loss(predicted_MLZ, lesson.reward, lesson.discount, bootstrap_MLZ)
    return (loss_ML * lesson.weight).sum() / lesson.counts.sum(), predicted_MLZ.detach()


def _of_action(out_MTAZ: Tensor, action_MT: Tensor) -> Tensor:
    """The numbers ``[M, T, Z]`` of the given actions."""
    index = action_MT[..., None, None].expand(-1, -1, 1, out_MTAZ.shape[-1])
    return out_MTAZ.gather(2, index).squeeze(2)


def best(target_MTAZ: Tensor, online_MTAZ: Tensor, at_ML: Tensor, head: QHead) -> Tensor:
    """The target network's numbers ``[M, L, Z]`` of the action that is best online, at the given steps."""
    best_MTZ = _of_action(target_MTAZ, head.values(online_MTAZ).argmax(-1))
    return best_MTZ.gather(1, at_ML.unsqueeze(-1).expand(-1, -1, best_MTZ.shape[-1]))


def _split_each(parts: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Batches of so many windows of each part; None stays None."""
    split = [None if part is None else part.split(size) for part in parts]
    count = next(len(batches) for batches in split if batches is not None)
    return zip(*([None] * count if batches is None else batches for batches in split), strict=True)
