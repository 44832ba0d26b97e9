"""On-policy data: every training batch is a fresh rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from tensordict import TensorDict

from lit_rl.collectors import RolloutCollector
from lit_rl.data.base import EnvDataModule
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError, check_range
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.ranks import together
from lit_rl.workers import Launcher, Workers, check_workers

# By the Trainer's precision, what `forward_context` is to the learner: it travels to other processes.
WORKER_CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "32-true": nullcontext,
    "bf16-mixed": partial(torch.autocast, "cpu", torch.bfloat16),
}


class RolloutLoader:
    """An epoch of rollouts. It has a length, or Lightning would fetch one rollout ahead: a stale one."""

    def __init__(self, collector: RolloutCollector | Workers, rollouts: int) -> None:
        self.collector = collector
        self.rollouts = rollouts

    def __len__(self) -> int:
        return self.rollouts

    def __iter__(self) -> Iterator[TensorDict]:
        for _ in range(self.rollouts):
            yield together(self.collector.rollout)


class RolloutDataModule(EnvDataModule):
    """Rollouts for training; whole episodes for validation, test and prediction.

    Args:
        env: the environment.
        rollout_length: steps of each environment in a rollout.
        sequence_length: steps of a training sequence, a divisor of `rollout_length`; all of it if absent.
        num_workers: processes that collect, each a share of the environments; 0 collects in the learner's.
        launcher: where workers run: `processes` of this machine, or `ray`, the machines of a Ray cluster
            (``RAY_ADDRESS``; one of this machine's own if unset).
        options: of `EnvDataModule`.

    Raises:
        UserError: sizes are not positive or do not divide, or the launcher is not installed.
    """

    def __init__(
        self,
        env: EnvConfig,
        *,
        rollout_length: int = 128,
        sequence_length: int | None = None,
        num_workers: int = 0,
        launcher: Launcher = "processes",
        **options: Any,
    ) -> None:
        super().__init__(env, **options)
        check_range({"rollout_length": rollout_length}, 1, 2**31 - 1)
        check_range({"num_workers": num_workers}, 0, 2**16)
        if num_workers:
            check_workers(env, num_workers, launcher)
        elif launcher != "processes":
            raise UserError(f"launcher {launcher} has no workers to launch: set num_workers")
        if sequence_length is not None and (sequence_length < 1 or rollout_length % sequence_length):
            raise UserError(
                f"sequence_length {sequence_length} does not divide rollout_length {rollout_length}: "
                "choose a divisor"
            )
        self.rollout_length = rollout_length
        self.sequence_length = sequence_length
        self.num_workers = num_workers
        self.launcher: Launcher = launcher

    def train_dataloader(self) -> RolloutLoader:
        assert self.trainer is not None
        seed = self._rank_seed(self.seed)
        collector: RolloutCollector | Workers
        if self.num_workers:
            collector = Workers(
                self.env,
                cast(ActorCritic, self._agent),
                num_workers=self.num_workers,
                launcher=self.launcher,
                rollout_length=self.rollout_length,
                sequence_length=self.sequence_length,
                seed=seed,
                context=WORKER_CONTEXTS[self.trainer.precision],
            )
        else:
            collector = RolloutCollector(
                self.env.make,
                cast(ActorCritic, self._agent),
                frames_per_batch=self.env.num_envs * self.rollout_length,
                sequence_length=self.sequence_length,
                seed=seed,
                context=self.trainer.precision_plugin.forward_context,
            )
        self._start(collector)
        return RolloutLoader(collector, self._batches_per_epoch(collector))
