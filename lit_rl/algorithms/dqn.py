"""Deep Q-learning over any trunk, from windows of experience.

DQN (Mnih et al. 2015, Nature 518) with what Rainbow (Hessel et al. 2018, arXiv 1710.02298) put together but
for noisy networks, on sequences as in R2D2 (Kapturowski et al. 2019, ICLR) and with the latents of Latent
Mamba-DQN in the replay. One update reads from top to bottom in `lit_rl.algorithms.window_loss`; here is what
surrounds it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import Any, Literal, cast

import lightning as L
import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl import keys
from lit_rl.algorithms.base import LitAgent
from lit_rl.algorithms.fused_dqn import FusedTDLoss, fused_td_loss
from lit_rl.algorithms.gradients import average_and_clip, backward, is_plain_fused_adam, optimizer_step
from lit_rl.algorithms.window_loss import Lesson, Prediction, WindowLoss
from lit_rl.data import ReplayDataModule
from lit_rl.data.replay import WindowShape
from lit_rl.data.window_replay import Drawn, WindowReplay
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError, check_range
from lit_rl.models.agent import TrunkFactory
from lit_rl.models.q_heads import ExpectedQ
from lit_rl.models.q_network import Exploration, HeadFactory, QNetwork
from lit_rl.ranks import gather_list, together
from lit_rl.trunks import MLP

STEPS_A_LESSON = 4096


class LitDQN(LitAgent):
    """Double DQN on windows, uniform or prioritized, with or without memory from before the window.

    Where memory comes from at a window's start is the `context`: `window` starts empty, and then the agent
    acts on the last `window` observations alone, too, and bootstraps from values of such windows (Latent
    Mamba-DQN); `stored` takes the memory that the agent had there when it acted (R2D2's stored state).
    Either may spend the first `burn_in` steps on bringing the memory up to date, without loss or gradient,
    or restrict the loss to the last `loss_steps` with the gradient reaching through the whole window. With
    ``loss_steps=1`` and a stride of 1 there is a window, and a priority, for each step.

    `latents` keeps what the trunk made of each step when it acted. Latent Mamba-DQN stores latents and leaves
    open what for; here they serve to measure how far the representation has moved since (``train/drift``, the
    distance of the stored and the present latent; ``train/delta_q``, R2D2's Delta-Q with the head applied to
    both), to mix that drift into the priority (`latent_priority`) and to stand for the steps beyond the
    window in the target (`latent_targets`). With ``context: window`` the drift has a second part: acting saw
    `window` steps of each, learning sees fewer but for the last step. The memory itself is the trunk's state
    and is kept by ``context: stored``.

    Args:
        env: the environment, for its spaces.
        trunk: the architecture (makes a trunk for a number of input features); `mlp` if absent.
        head: makes the head for a number of features and actions: `ExpectedQ` (if absent), `CategoricalQ`
            (C51) or `QuantileQ` (QR-DQN), each with `dueling` and `hidden`.
        total_frames: environment frames to train for.
        window: steps of a window, those without a loss included.
        context: where memory comes from at a window's start.
        burn_in: first steps of a window that only bring the memory up to date.
        loss_steps: last steps of a window that have a loss; all behind `burn_in` if absent. Drift and Delta-Q
            are of these, too. A trunk without memory passes over these alone. A trunk's auxiliary loss is of
            the steps that learning passes over.
        n_step: steps to look ahead in the target.
        batch_size: windows an optimizer step, M. With several processes each draws so many from a replay of
            its own, takes the mean over its own steps that count, and gradients are averaged.
        updates_per_block: optimizer steps for each block of collected steps.
        learning_starts: frames before the first optimizer step; a resumed run without its replay waits for as
            many again.
        gamma: discount.
        double: the online network chooses the action that the target network values (van Hasselt et al.
            2016, arXiv 1509.06461).
        target_update_frames: frames between copies of the online network to the target network.
        tau: follow the online network by this share at every optimizer step instead.
        exploration: `epsilon_greedy`, or `softmax` over action values.
        exploration_initial: share of random actions (or temperature) at the start.
        exploration_final: that at the end, reached linearly.
        exploration_frames: frames until then.
        beta: exponent of the importance weights at the start (where the replay is prioritized).
        beta_final: that at the end of training, reached linearly.
        priority_eta: a window's priority is so much of its largest TD error and the rest of their mean
            (R2D2, section 2.3).
        priority_clip: TD errors count as at most this in priorities (Schaul et al. 2016 clip them at 1); not
            clipped if absent.
        max_grad_norm: the gradient's norm is clipped to this.
        lr: Adam's learning rate.
        trunk_lr: that of the trunk's parameters; `lr` if absent.
        anneal_lr: learning rates fall linearly to 0.
        weight_decay: decoupled (AdamW), if above 0.
        encoder_width: features of a linear + ReLU layer before the trunk; none if absent.
        normalize_observation: by running mean and standard deviation; the replay keeps what was observed.
        latents: keep the latent of each step.
        latent_priority: share of the drift in a window's priority.
        latent_targets: stored latents stand for the steps beyond the window, which are not passed over.
        log_frames: frames between records.

    Raises:
        UserError: actions that are not discrete, sizes that do not fit, losses that are not finite.
    """

    def __init__(
        self,
        env: EnvConfig,
        trunk: TrunkFactory | None = None,
        head: HeadFactory | None = None,
        *,
        total_frames: int = 100_000,
        window: int = 1,
        context: Literal["window", "stored"] = "window",
        burn_in: int = 0,
        loss_steps: int | None = None,
        n_step: int = 1,
        batch_size: int = 64,
        updates_per_block: int = 1,
        learning_starts: int = 1_000,
        gamma: float = 0.99,
        double: bool = True,
        target_update_frames: int = 1_000,
        tau: float | None = None,
        exploration: Exploration = "epsilon_greedy",
        exploration_initial: float = 1.0,
        exploration_final: float = 0.05,
        exploration_frames: int = 10_000,
        beta: float = 0.4,
        beta_final: float = 1.0,
        priority_eta: float = 0.9,
        priority_clip: float | None = None,
        max_grad_norm: float = 10.0,
        lr: float = 1e-3,
        trunk_lr: float | None = None,
        anneal_lr: bool = False,
        weight_decay: float = 0.0,
        encoder_width: int | None = None,
        normalize_observation: bool = False,
        latents: bool = False,
        latent_priority: float = 0.0,
        latent_targets: bool = False,
        log_frames: int = 1_000,
    ) -> None:
        super().__init__(env.id, total_frames=total_frames, lr=lr, trunk_lr=trunk_lr, anneal_lr=anneal_lr)
        sizes = {"window": window, "n_step": n_step, "batch_size": batch_size, "log_frames": log_frames}
        check_range(
            sizes | {"updates_per_block": updates_per_block, "exploration_frames": exploration_frames}, 1
        )
        check_range({"learning_starts": learning_starts, "weight_decay": weight_decay}, 0)
        check_range({"target_update_frames": target_update_frames, "encoder_width": encoder_width}, 1)
        shares = {"gamma": gamma, "beta": beta, "beta_final": beta_final, "priority_eta": priority_eta}
        check_range(shares | {"latent_priority": latent_priority}, 0, 1)
        above_zero = {"max_grad_norm": max_grad_norm, "tau": tau, "priority_clip": priority_clip}
        check_range(above_zero, 0, above=True)
        check_range({"tau": tau}, 0, 1)
        most = 1.0 if exploration == "epsilon_greedy" else math.inf
        exploring = {"exploration_initial": exploration_initial, "exploration_final": exploration_final}
        check_range(exploring, 0, most)
        for option, given, allowed in (
            ("context", context, ("window", "stored")),
            ("exploration", exploration, ("epsilon_greedy", "softmax")),
        ):
            if given not in allowed:
                raise UserError(f"{option} is {given!r}: choose {' or '.join(allowed)}")
        if not 0 <= burn_in < window:
            raise UserError(
                f"burn_in is {burn_in} and the window {window} steps: leave steps to learn from, or lengthen "
                "the window"
            )
        if loss_steps is not None and not 1 <= loss_steps <= window - burn_in:
            raise UserError(
                f"loss_steps is {loss_steps}: it must be from 1 to the {window - burn_in} steps behind "
                "burn_in"
            )
        if (latent_priority or latent_targets) and not latents:
            raise UserError("latent_priority and latent_targets need stored latents: set latents to true")
        observation_space, action_space = env.spaces()
        self.agent: QNetwork = QNetwork(
            observation_space,
            action_space,
            trunk or MLP,
            head or ExpectedQ,
            encoder_width=encoder_width,
            normalize_observation=normalize_observation,
            exploration=exploration,
            acting_window=window if context == "window" else None,
        )
        self.target = copy.deepcopy(self.agent).requires_grad_(False)
        self.target.norms = self.agent.norms  # both see what acting sees
        loss_steps = window - burn_in if loss_steps is None else loss_steps
        self.loss = WindowLoss(
            window=window,
            context=context,
            burn_in=burn_in,
            loss_steps=loss_steps,
            n_step=n_step,
            gamma=gamma,
            double=double,
            priority_eta=priority_eta,
            priority_clip=math.inf if priority_clip is None else priority_clip,
            latents=latents,
            latent_priority=latent_priority,
            latent_targets=latent_targets,
        )
        self.context = context
        self.batch_size = batch_size
        self.updates_per_block = updates_per_block
        self.learning_starts = learning_starts
        self.target_update_frames = target_update_frames
        self.tau = tau
        self.exploration_rate = (exploration_initial, exploration_final)
        self.exploration_frames = exploration_frames
        self.beta = (beta, beta_final)
        self.max_grad_norm = max_grad_norm
        self.weight_decay = weight_decay
        self.log_every = log_frames
        self._logged_at = self._began_at = 0
        self._learning = False
        self._replay_began = 0  # frames when the replay was last empty
        self._ready_at = time.perf_counter()
        self._since_log: dict[str, float] = {"collecting": 0.0, "learning": 0.0}
        self._measured: list[tuple[int, dict[str, Tensor]]] = []  # of so many updates
        self._learning_parameters: list[Tensor] = []
        self._grad_norms: list[float] = []
        self._finished: list[Tensor] = []

    @property
    def window_shape(self) -> WindowShape:
        return WindowShape(
            window=self.loss.window,
            lookahead=self.loss.n_step,
            unlearnt=self.loss.window - self.loss.loss_steps,
            with_state=self.context == "stored" and not self.agent.is_memoryless,
            with_latent=self.loss.latents,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(  # Adam, where the decay is 0
            self.parameter_groups(), weight_decay=self.weight_decay, fused=True
        )

    def check_data(self, data: L.LightningDataModule) -> None:
        """Raises `UserError` where the replay of `data` cannot hold the windows, or these give no memory."""
        if not isinstance(data, ReplayDataModule):
            raise UserError(
                f"LitDQN learns from a replay, not from {type(data).__name__}: use ReplayDataModule"
            )
        if self.loss.window == 1 and self.context == "window" and not self.agent.is_memoryless:
            raise UserError(
                "with windows of 1 step that begin without memory the trunk has none: set window, or context "
                "to stored"
            )
        of_priorities = {
            "latent_priority": self.loss.latent_priority,
            "priority_clip": self.loss.priority_clip,
        }
        for option, value in of_priorities.items():
            if 0 < value < math.inf and data.priority_exponent == 0:
                raise UserError(
                    f"{option} is {value:g} where windows are drawn uniformly: set --data.priority_exponent"
                )
        data.check_window(self.window_shape, self.batch_size)

    def on_fit_start(self) -> None:
        self.check_data(self.data)
        self._learning_parameters = list(self.agent.parameters())
        self._logged_at = self._began_at = self.frames
        self._learning = False
        self._apply_exploration()

    def on_train_start(self) -> None:
        super().on_train_start()
        begins_empty = 0 in gather_list([len(self._replay())])
        if begins_empty:
            self._replay_began = self.frames
        if self.trainer.is_global_zero and self.frames < self.total_frames:
            first_update = self._replay_began + self.learning_starts
            if self.total_frames < first_update:
                print(f"nothing will be learnt before frame {first_update:,}: lower model.learning_starts")
            elif begins_empty and self.frames:
                print(f"the replay is empty: learning goes on at frame {first_update:,}")
        self.set_learning_rates()  # a checkpoint's optimizer has the rates of the run that made it
        for group in self.trainer.optimizers[0].param_groups:
            group["weight_decay"] = self.weight_decay

    def on_train_end(self) -> None:
        is_spent = self._began_at < self.frames and self.frames >= self.total_frames
        was_due = self._replay_began + self.learning_starts <= self.frames
        if self.trainer.is_global_zero and is_spent and was_due and not self._learning:
            steps = self.loss.window + self.loss.n_step
            print(f"nothing was learnt: no {steps} steps in a row for a window: lower model.window")

    def on_train_epoch_start(self) -> None:
        self._ready_at = time.perf_counter()

    # ------------------------------------------------------------------ one block

    def training_step(self, collected: TensorDict, batch_idx: int) -> None:
        learning_from = time.perf_counter()
        before, episodes = self.frames, collected[keys.EPISODES]
        self.frames += episodes.numel() * self.trainer.world_size
        self._finished.append(self.finished(episodes))
        replay = self._replay()
        if self.frames - self._replay_began >= self.learning_starts and self._all_have(replay):
            together(lambda: self._learn(replay))
        if (
            self.tau is None
            and self.frames // self.target_update_frames > before // self.target_update_frames
        ):
            self._follow(1.0)
        self._apply_exploration()  # for the steps to come
        self.set_learning_rates()
        self._update_normalization(collected[keys.WINDOWS])

        now = time.perf_counter()
        self._since_log["collecting"] += learning_from - self._ready_at
        self._since_log["learning"] += now - learning_from
        if self.frames - self._logged_at >= self.log_every:
            self._log_block(len(replay))
        self._ready_at = time.perf_counter()
        if self.frames >= self.total_frames:
            self.trainer.should_stop = True

    def _apply_exploration(self) -> None:
        first, last = self.exploration_rate
        self.agent.exploration_rate = first + (last - first) * min(self.frames / self.exploration_frames, 1.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["head"] = self.agent.head.description
        checkpoint["replay_began"] = self._replay_began

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        head, my_head = checkpoint.get("head"), self.agent.head.description
        if head not in (None, my_head):
            raise UserError(
                f"the checkpoint does not fit: its head is {head}, this run's {my_head}: set --model.head"
            )
        super().check_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._replay_began = checkpoint.get("replay_began", 0)
        self._apply_exploration()  # for evaluation that explores

    def _replay(self) -> WindowReplay:
        return cast(WindowReplay, cast(ReplayDataModule, self.data).replay)

    def _update_normalization(self, windows: TensorDict) -> None:
        """In all processes where one of them has windows, even if this one has none: they sum up together."""
        if self.agent.normalized and sum(gather_list([len(windows)])):
            self.agent.update_normalization(windows[keys.STEPS, keys.OBSERVATION])

    def _all_have(self, replay: WindowReplay) -> bool:
        """Whether every process has windows: all of them take the same steps, or none does."""
        if not self._learning:
            self._learning = min(gather_list([len(replay)])) > 0
        return self._learning

    def _learn(self, replay: WindowReplay) -> None:
        """So many updates, in groups that one lesson serves: while the target network stands still."""
        first, last = self.beta
        beta = first + (last - first) * self.progress
        fused_loss = self._fused_loss()
        left = self.updates_per_block
        while left:
            updates = min(left, self._updates_a_lesson(replay))
            drawn = replay.sample(updates * self.batch_size, beta=beta)
            drawn = Drawn(*(part.to(self.device) for part in drawn)) if self.device.type != "cpu" else drawn
            lesson = self.loss.lesson(self.target, drawn)
            fused = fused_loss if fused_loss is not None and fused_loss.takes(lesson) else None
            predictions = [self._update(batch, fused) for batch in lesson.split(self.batch_size)]
            priority, measured = self.loss.judge(self.agent.head, lesson, predictions)
            replay.update_priority(drawn.indices, priority)
            self._measured.append((updates, measured))
            left -= updates
        self.count_optimizer_steps(self.updates_per_block)

    def _updates_a_lesson(self, replay: WindowReplay) -> int:
        """As many as fit into memory easily; one where the next draw or target depends on it."""
        if replay.is_prioritized or self.tau is not None:
            return 1
        return max(1, STEPS_A_LESSON // (self.batch_size * (self.loss.window + self.loss.n_step)))

    def _update(self, lesson: Lesson, fused_loss: FusedTDLoss | None) -> Prediction:
        """One optimizer step."""
        prediction = self._descend(lesson) if fused_loss is None else fused_loss(lesson)
        norm = average_and_clip(self._learning_parameters, self.max_grad_norm)
        if not math.isfinite(norm):
            raise UserError(
                f"the loss or its gradient is not finite at {self.frames} frames; this step was not "
                "taken and the last checkpoint is whole: lower the learning rate, or scale rewards"
            )
        optimizer_step(self.trainer.optimizers[0])
        for parameter in self._learning_parameters:
            parameter.grad = None
        if self.tau is not None:
            self._follow(self.tau)
        self._grad_norms.append(norm)
        return prediction

    def _descend(self, lesson: Lesson) -> Prediction:
        """What the network says of the lesson; sets the gradients of the loss."""
        prediction = self._predict(lesson)
        loss = prediction.loss if prediction.auxiliary is None else prediction.loss + prediction.auxiliary
        # An error that is clipped has a finite gradient even where it is infinite itself.
        backward(loss, None if math.isfinite(loss.item()) else torch.full_like(loss, torch.nan))
        return prediction

    def _predict(self, lesson: Lesson) -> Prediction:
        return self.loss.predict(self.agent, lesson)

    def _fused_loss(self) -> FusedTDLoss | None:
        """What gives loss and gradients of a batch at once, where there is such a thing.

        It reads weights where they lie, so it is for an optimizer that changes them in place.
        """
        for method, mine in ((self._descend, LitDQN._descend), (self._predict, LitDQN._predict)):
            if getattr(method, "__func__", None) is not mine:
                return None
        if not is_plain_fused_adam(self.trainer.optimizers[0]):
            return None
        return fused_td_loss(self.agent, self.loss, self.batch_size)

    @torch.no_grad()
    def _follow(self, share: float) -> None:
        """Moves the target network towards the online network: all the way with a share of 1."""
        theirs: list[Tensor] = list(self.target.parameters())
        mine: list[Tensor] = list(self.agent.parameters())
        if share == 1.0:
            torch._foreach_copy_(theirs, mine)
        else:
            torch._foreach_lerp_(theirs, mine, share)
        for its, my in zip(self.target.trunk.buffers(), self.agent.trunk.buffers(), strict=True):
            its.copy_(my)

    # ------------------------------------------------------------------ what a block tells

    def _log_block(self, windows: int) -> None:
        """One record of the blocks since the last; losses are this process's, episodes those of all."""
        frames, self._logged_at = self.frames - self._logged_at, self.frames
        record: dict[str, float] = {}
        if self._measured:
            updates = torch.tensor([float(number) for number, _ in self._measured], device=self.device)
            for key in self._measured[0][1]:
                parts = torch.stack([measured[key] for _, measured in self._measured])
                record[f"train/{key}"] = ((parts * updates).sum() / updates.sum()).item()
            record["train/grad_norm"] = sum(self._grad_norms) / len(self._grad_norms)
        record["train/exploration"] = self.agent.exploration_rate
        record["replay/windows"] = float(windows)
        record |= self.episode_means(torch.cat(self._finished))
        record |= self.state_of_training(frames, **self._since_log)
        self.log_frames(record)
        self._measured, self._grad_norms, self._finished = [], [], []
        self._since_log = {"collecting": 0.0, "learning": 0.0}
