"""What the tests put into a run, by class path: it notes what it finds, or does harm at a chosen moment."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
import lightning as L
import torch
import torch.distributed as dist

from lit_rl.algorithms.base import random_state

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class SignalAt(L.Callback):
    """Sends this process a signal when `hook` is called at so many frames."""

    def __init__(self, name: str, hook: str, frames: int) -> None:
        self.number, self.frames = signal.Signals[name], frames
        setattr(self, hook, self._send)

    def _send(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if pl_module.frames == self.frames:
            os.kill(os.getpid(), self.number)


class Probe(L.Callback):
    """Compares weights over the ranks after every update; writes `FOLDER/rank_N.pt` when training ends."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.found: dict[str, Any] = {"rollouts": [], "equal": [], "frames": [], "episodes": 0}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found["start"] = clone(pl_module.state_dict())
        self.found["optimizer"] = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.found["generator"] = trainer.datamodule.collector.generator.get_state()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found.setdefault("random_state", random_state())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.found["rollouts"].append(batch.clone())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        state = clone(pl_module.state_dict())
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, state)
        self.found["equal"].append(all(same(state, other) for other in states))
        self.found["frames"].append(pl_module.frames)
        self.found.setdefault("after_first", state)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.found["episodes"] += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found["end"] = clone(pl_module.state_dict())
        self.found["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.found, self.folder / f"rank_{RANK}.pt")


def clone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class FaultAt(gym.Wrapper):
    """Raises in one rank, in place of step number `after` + 1."""

    def __init__(self, env: gym.Env, rank: int, after: int) -> None:
        super().__init__(env)
        self.rank, self.left = rank, after

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left < 0 and self.rank == RANK:
            raise RuntimeError("this one is broken")
        return super().step(action)
