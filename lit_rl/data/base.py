"""What data of every algorithm share: an environment, a collector, whole episodes for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import lightning as L
import torch
from gymnasium.vector import VectorEnv
from tensordict import TensorDict

from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError, check_range
from lit_rl.evaluation import Episodes
from lit_rl.models.agent import Agent
from lit_rl.ranks import gather_list, together


class Collector(Protocol):
    """What gathers experience: an `EnvCollector`, or `Workers` that have one each."""

    frames_per_batch: int

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None: ...

    def shutdown(self) -> None: ...


class EnvDataModule(L.LightningDataModule):
    """Batches of experience for training (a subclass says which); whole episodes for evaluation.

    The agent that acts is the LightningModule's (`trainer.lightning_module.agent`), under the Trainer's
    precision. With several processes each has its own environments, seeded by rank.

    Args:
        env: the environment.
        frames_per_epoch: environment frames (over all processes) between evaluations and checkpoints.
        episodes: how many an evaluation runs.
        greedy: evaluate with the agent's best action; with samples otherwise.
        seed: of training environments and actions.
        evaluation_seed: of evaluation environments and actions.

    Raises:
        UserError: sizes are not positive.
    """

    def __init__(
        self,
        env: EnvConfig,
        *,
        frames_per_epoch: int = 20_000,
        episodes: int = 10,
        greedy: bool = True,
        seed: int = 0,
        evaluation_seed: int = 1_000_000,
    ) -> None:
        super().__init__()
        check_range({"frames_per_epoch": frames_per_epoch, "episodes": episodes}, 1, 2**31 - 1)
        check_range({"seed": seed, "evaluation_seed": evaluation_seed}, 0, 2**31 - 1)
        self.env = env
        self.frames_per_epoch = frames_per_epoch
        self.episodes = episodes
        self.greedy = greedy
        self.seed = seed
        self.evaluation_seed = evaluation_seed
        self.collector: Collector | None = None
        self._collector_state: dict[str, Any] | None = None
        self._evaluation_envs: list[VectorEnv] = []

    @property
    def _agent(self) -> Agent:
        assert self.trainer is not None
        return cast(Agent, self.trainer.lightning_module.agent)

    # ------------------------------------------------------------------ loaders

    def _rank_seed(self, seed: int) -> int:
        """Another seed for each rank; environments spread it."""
        assert self.trainer is not None
        return seed + 10_000 * self.trainer.global_rank

    def _batches_per_epoch(self, collector: Collector) -> int:
        assert self.trainer is not None
        return max(1, self.frames_per_epoch // (collector.frames_per_batch * self.trainer.world_size))

    def _start(self, collector: Collector) -> None:
        """Makes it the collector of this run; where the run goes on, it does too."""
        self.collector = collector
        together(self._check_past)
        if self._collector_state is not None:
            collector.load_state_dict(self._collector_state)
            self._collector_state = None

    def _check_past(self) -> None:
        """Raises `UserError` where processes go on from different checkpoints."""
        assert self.trainer is not None
        frames = cast(Any, self.trainer.lightning_module).frames
        pasts = gather_list([f"{self.trainer.ckpt_path or 'none'} ({frames:,} frames)"])
        if len(set(pasts)) > 1:
            raise UserError(
                f"processes go on from different checkpoints, {' and '.join(dict.fromkeys(pasts))}: give the "
                "path of one that all of them can read"
            )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Rollouts go to the learner's device; on the CPU they are there, and looking for it takes time."""
        return batch.to(device) if isinstance(batch, TensorDict) and device.type != "cpu" else batch

    def val_dataloader(self) -> Episodes:
        return self._episodes()

    def test_dataloader(self) -> Episodes:
        return self._episodes()

    def predict_dataloader(self) -> Episodes:
        return self._episodes(record=True)

    def _episodes(self, *, record: bool = False) -> Episodes:
        trainer = self.trainer
        assert trainer is not None
        rank, world_size = trainer.global_rank, trainer.world_size
        share = self.episodes // world_size + (rank < self.episodes % world_size)
        env = self.env.make(num_envs=max(1, min(share, 16)))
        self._evaluation_envs.append(env)
        return Episodes(
            env,
            self._agent,
            share,
            greedy=self.greedy,
            seed=self._rank_seed(self.evaluation_seed),
            record=record,
            context=trainer.precision_plugin.forward_context,
        )

    def rendered_episode(self, max_frames: int) -> Episodes:
        """One episode with at most so many pictures, on the backend that can draw."""
        trainer = self.trainer
        assert trainer is not None
        env = replace(self.env, backend="gymnasium").make(num_envs=1, render_mode="rgb_array")
        self._evaluation_envs.append(env)
        return Episodes(
            env,
            self._agent,
            1,
            greedy=self.greedy,
            seed=self.evaluation_seed,
            render=max_frames,
            context=trainer.precision_plugin.forward_context,
        )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The collectors' random states and frame counts, one for each rank."""
        if self.collector is None:
            return {}
        return {"collectors": gather_list([dict(self.collector.state_dict())])}

    def after_last_checkpoint(self) -> None:
        """Called in every process when `last.ckpt` has been written."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.trainer is not None
        collectors = state_dict.get("collectors", [])
        if self.trainer.global_rank < len(collectors):
            self._collector_state = collectors[self.trainer.global_rank]

    def teardown(self, stage: str) -> None:
        if self.collector is not None:
            self.collector.shutdown()
            self.collector = None
        while self._evaluation_envs:
            self._evaluation_envs.pop().close()
