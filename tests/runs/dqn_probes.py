"""What a DQN run is like when training starts and when it ends or is stopped, written by the run itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_rl.algorithms.base import random_state
from lit_rl.algorithms.dqn import LitDQN
from lit_rl.data.window_replay import Drawn

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Snapshots(L.Callback):
    """Writes `FOLDER/{start,end}_RANK.pt`; none if the folder is called `none`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: L.Trainer, pl_module: LitDQN, stage: str) -> None:
        begin = pl_module.on_train_start

        def begin_and_look() -> None:
            begin()  # the last to restore something, behind all callbacks
            self._write(trainer, "start")

        pl_module.on_train_start = begin_and_look

    def on_train_end(self, trainer: L.Trainer, pl_module: LitDQN) -> None:
        self._write(trainer, "end")

    def on_exception(self, trainer: L.Trainer, pl_module: LitDQN, exception: BaseException) -> None:
        if trainer.datamodule.replay is not None:
            self._write(trainer, "end")

    def _write(self, trainer: L.Trainer, when: str) -> None:
        if self.folder.name == "none":
            return
        self.folder.mkdir(exist_ok=True)
        torch.save(snapshot(trainer), self.folder / f"{when}_{RANK}.pt")


class Drawings(L.Callback):
    """Writes `FOLDER/rank_N.pt`: the state at the start, every batch that was drawn, the state at the end."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.found: dict[str, Any] = {"drawn": []}

    def on_train_start(self, trainer: L.Trainer, pl_module: LitDQN) -> None:
        self.found["start"] = {key: value.clone() for key, value in pl_module.state_dict().items()}
        replay = trainer.datamodule.replay
        sample = replay.sample

        def sample_and_note(*args: Any, **options: Any) -> Drawn:
            drawn = sample(*args, **options)
            self.found["drawn"].append((drawn.windows.to_dict(), drawn.weight))
            return drawn

        replay.sample = sample_and_note

    def on_train_end(self, trainer: L.Trainer, pl_module: LitDQN) -> None:
        self.found["end"] = pl_module.state_dict()
        self.folder.mkdir(exist_ok=True)
        torch.save(self.found, self.folder / f"rank_{RANK}.pt")


def read(folder: str, when: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(Path(folder) / f"{when}_{rank}.pt", weights_only=False)


def snapshot(trainer: L.Trainer) -> dict[str, Any]:
    """All that a resumed run must find again."""
    module, data = trainer.lightning_module, trainer.datamodule
    replay = data.replay
    stored = replay._stored()
    every = torch.arange(len(replay))
    return {
        "replay": {} if stored is None else dict(stored.flatten_keys(".").clone().to_dict()),
        "windows": len(replay),
        "priorities": replay._sampler._sum_tree[every] if replay.is_prioritized and len(replay) else None,
        "place": replay._buffer.writer._cursor,
        "drawing": replay._generator.get_state(),
        "exploring": data.collector.generator.get_state(),
        "weights": {key: value.clone() for key, value in module.agent.state_dict().items()},
        "target": {key: value.clone() for key, value in module.target.state_dict().items()},
        "optimizer": [dict(state) for state in trainer.optimizers[0].state_dict()["state"].values()],
        "exploration_rate": module.agent.exploration_rate,
        "frames": module.frames,
        "collected": data.collector.state_dict()["frames"],
        "random": random_state(),
    }


def same(one: Any, other: Any) -> bool:
    """Bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
