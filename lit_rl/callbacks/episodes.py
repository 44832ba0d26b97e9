"""Episodes on disk: the offline data of `lit-rl predict`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from tensordict import TensorDict


class EpisodeWriter(BasePredictionWriter):
    """Writes every predicted episode to a folder of its own, as a memory-mapped TensorDict ``[L]``.

    Read one with ``TensorDict.load_memmap(folder / "episode_000000")``. An episode's folder
    appears under its name only when it is whole.

    Args:
        folder: gets the episodes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert isinstance(prediction, TensorDict)
        index = batch_idx * trainer.world_size + trainer.global_rank
        partial = self.folder / f".episode_{index:06d}"
        prediction.cpu().memmap(partial)
        os.replace(partial, self.folder / f"episode_{index:06d}")
