"""What every algorithm shares: an agent, a count of frames, learning rates, evaluation, whole checkpoints."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_rl import keys
from lit_rl.data import EnvDataModule
from lit_rl.errors import UserError, check_range
from lit_rl.evaluation import Episode, summarize
from lit_rl.models.agent import Agent
from lit_rl.models.normalization import reduce_sum
from lit_rl.ranks import gather_list

EPISODE_STATISTICS = (keys.EPISODE_RETURN, keys.EPISODE_LENGTH, keys.EPISODE_SUCCESS)


class LitAgent(L.LightningModule):
    """A LightningModule with an agent, whose clock is the number of environment frames.

    `frames` counts the frames of all processes; budgets, schedules and the x axis of every plot are in
    frames (Lightning's `global_step` counts optimizer steps). Training stops when `total_frames` is
    reached. Random states, frames and the names of algorithm, trunk and environment are part of the
    checkpoint.

    Args:
        environment: its name.
        total_frames: environment frames to train for.
        lr: learning rate.
        trunk_lr: that of the trunk's parameters; `lr` if absent.
        anneal_lr: learning rates fall linearly to 0.
    """

    agent: Agent

    def __init__(
        self, environment: str, *, total_frames: int, lr: float, trunk_lr: float | None, anneal_lr: bool
    ) -> None:
        super().__init__()
        self.environment = environment
        check_range({"total_frames": total_frames}, 1)
        check_range({"lr": lr, "trunk_lr": trunk_lr}, 0)
        self.total_frames = total_frames
        self.lr = lr
        self.trunk_lr = lr if trunk_lr is None else trunk_lr
        self.anneal_lr = anneal_lr
        self.frames = 0
        self.automatic_optimization = False
        self.recent_returns: deque[float] = deque(maxlen=100)
        self._episodes: list[Episode] = []
        self.evaluated = 0, 0
        """how many episodes the last evaluation had, and after how many frames it was"""
        self._random_state: list[Any] | None = None

    def setup(self, stage: str) -> None:
        self.check_precision(self.trainer.precision)
        self.check_strategy(self.trainer.strategy)

    def check_precision(self, precision: str) -> None:
        """Raises `UserError` for a precision of the Trainer under which ratios would not be 1."""
        if precision not in ("32-true", "bf16-mixed"):
            raise UserError(
                f"precision {precision} is not supported: use 32-true or bf16-mixed (heads and "
                "losses need float32, and there is no loss scaling)"
            )

    def check_strategy(self, strategy: Strategy) -> None:
        """Raises `UserError` for a strategy of the Trainer whose processes do not hold all parameters."""
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"strategy {type(strategy).__name__} is not supported: use auto or ddp (each process needs "
                "all parameters and gradients)"
            )

    @property
    def data(self) -> EnvDataModule:
        """The run's environment and experience."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def progress(self) -> float:
        """Share of the frame budget that is spent, 0 to 1."""
        return min(self.frames / self.total_frames, 1.0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimizer: what is around the trunks, and the trunks, each with its learning rate."""
        in_trunks = [p for trunk in self.agent.trunks() for p in trunk.parameters()]
        known = set(map(id, in_trunks))
        rest = [p for p in self.agent.parameters() if id(p) not in known]
        return [{"params": rest, "lr": self.lr}, {"params": in_trunks, "lr": self.trunk_lr}]

    def set_learning_rates(self) -> None:
        """Of both groups, for the share of the budget that is spent."""
        left = 1 - self.progress if self.anneal_lr else 1.0
        for group, lr in zip(self.trainer.optimizers[0].param_groups, (self.lr, self.trunk_lr), strict=True):
            group["lr"] = lr * left

    def count_optimizer_steps(self, steps: int) -> None:
        """Adds to Lightning's `global_step` what was done without its optimizer wrapper."""
        done = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for count in (done.total, done.current):
            count.ready += steps
            count.completed += steps

    def log_frames(self, metrics: dict[str, float]) -> None:
        """One record at the current frame count in every logger."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger) and not logger._prefix:
                write_scalars(logger, metrics, self.frames)
            else:
                logger.log_metrics(metrics, step=self.frames)

    def state_of_training(self, frames: int, collecting: float, learning: float) -> dict[str, float]:
        """What every algorithm records: learning rates, the trunk's metrics of its last pass, and speed.

        Args:
            frames: since the last record, of all processes.
            collecting: seconds that they took.
            learning: seconds spent on learning from them.
        """
        groups = self.trainer.optimizers[0].param_groups
        record = {
            f"train/{name}": group["lr"] for name, group in zip(("lr", "trunk_lr"), groups, strict=True)
        }
        record |= {f"trunk/{name}": value.item() for name, value in self.agent.trunk_metrics().items()}
        record["speed/steps_per_second"] = frames / (collecting + learning)
        record["speed/collect_steps_per_second"] = frames / collecting
        record["speed/learn_steps_per_second"] = frames / learning
        return record

    def finished(self, steps_ET: TensorDict) -> Tensor:
        """Statistics ``[K, 3]`` of the episodes that ended in these steps; keeps returns as recent ones."""
        episodes = torch.stack([steps_ET[key] for key in EPISODE_STATISTICS], -1)
        episodes = episodes[episodes[..., 0].isfinite()]
        self.recent_returns.extend(episodes[:, 0].tolist())
        return episodes

    def episode_means(self, episodes: Tensor) -> dict[str, float]:
        """Means over finished episodes ``[K, 3]`` (`EPISODE_STATISTICS`) of all processes; empty if none."""
        told = episodes.isfinite()
        sums, counts = reduce_sum(torch.stack([episodes.nan_to_num(0.0).sum(0), told.sum(0)]))
        means = zip(EPISODE_STATISTICS, sums.tolist(), counts.tolist(), strict=True)
        return {key.replace("_", "/", 1): total / n for key, total, n in means if n}

    def on_train_start(self) -> None:
        if not torch.cuda.is_available():
            # Lightning sets it, and every optimizer step would load NVIDIA's library anew to look for a GPU.
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
        if self._random_state is not None:
            set_random_state(self._random_state[self.global_rank % len(self._random_state)])
            self._random_state = None
        if self.frames >= self.total_frames:  # resumed where the budget is spent already
            self.trainer.should_stop = True

    def check_data(self, data: L.LightningDataModule) -> None:
        """Raises `UserError` where the data do not fit the algorithm; called before anything is written."""

    # ------------------------------------------------------------------ evaluation: a batch is an episode

    def on_validation_start(self) -> None:
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            # In a first pass, which a sanity check is, processes would exchange buffers that are equal, and
            # one without an episode would not come.
            model.require_forward_param_sync = False

    def validation_step(self, episode: Episode, batch_idx: int) -> None:
        self._episodes.append(episode)

    def test_step(self, episode: Episode, batch_idx: int) -> None:
        self._episodes.append(episode)

    def predict_step(self, episode: Episode, batch_idx: int) -> TensorDict | None:
        """The episode's steps, a TensorDict ``[L]``."""
        return episode.steps

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        episodes, self._episodes = gather_list(self._episodes), []
        if self.trainer.sanity_checking:
            return
        self.evaluated = len(episodes), self.frames
        summary = summarize(episodes)
        metrics = {f"{stage}/{key}": value for key, value in summary.items()}
        # A metric called `step` is Lightning's way to set the x axis.
        self.log_dict({**metrics, "step": float(self.frames)})

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["frames"] = self.frames
        checkpoint["random_state"] = gather_list([random_state()])
        checkpoint["algorithm"] = type(self).__name__
        checkpoint["trunk"] = trunk_name(self.agent)
        checkpoint["environment"] = self.environment

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises `UserError` where a checkpoint is of another algorithm or agent."""
        algorithm, my_algorithm = checkpoint.get("algorithm"), type(self).__name__
        if algorithm not in (None, my_algorithm):
            raise UserError(
                f"the checkpoint does not fit: it is of {algorithm}, this run of {my_algorithm}: set --model"
            )
        saved = {key: value.shape for key, value in checkpoint["state_dict"].items()}
        mine = {key: value.shape for key, value in self.state_dict().items()}
        trunk, my_trunk = checkpoint.get("trunk"), trunk_name(self.agent)
        if saved != mine or trunk != my_trunk:
            different = sorted(key for key in saved.keys() | mine.keys() if saved.get(key) != mine.get(key))
            first = "".join(
                f", first {key} (checkpoint {_shape(saved.get(key))}, run {_shape(mine.get(key))})"
                for key in different[:1]
            )
            trunks = "" if trunk == my_trunk else f"it holds trunk {trunk}, this run builds {my_trunk}; "
            raise UserError(
                f"the checkpoint does not fit: {trunks}{len(different)} tensors differ{first}: use the "
                "trunk, its options and an environment with the spaces of the run that made it"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        self.frames = checkpoint.get("frames", 0)
        self._random_state = checkpoint.get("random_state")


@rank_zero_only
def write_scalars(logger: TensorBoardLogger, metrics: dict[str, float], step: int) -> None:
    """All scalars in one event; the logger's own way is an event for each, which takes longer."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
    logger.experiment.file_writer.add_summary(Summary(value=values), step)


def _shape(shape: torch.Size | None) -> str:
    return "has none" if shape is None else str(list(shape))


def trunk_name(agent: nn.Module) -> str:
    trunk = type(agent.trunk)
    return f"{trunk.__module__}.{trunk.__qualname__}"


def random_state() -> dict[str, Any]:
    """Python's, numpy's and torch's random states, of types that a checkpoint may hold."""
    version, internal, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(key, np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, key, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, key.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        here = state["cuda"][: torch.cuda.device_count()]  # there may have been more devices
        torch.cuda.set_rng_state_all([cuda.cpu() for cuda in here])
