"""A live line: frames, speed, return."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from lit_rl.algorithms.base import LitAgent


class FrameProgress(ProgressBar):
    """One line that is rewritten in a terminal, and repeated now and then in a log file.

    Args:
        every_seconds: between two lines where the output is not a terminal.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.is_terminal = sys.stdout.isatty()
        self.every_seconds = 0.2 if self.is_terminal else every_seconds
        self._enabled = True
        self._started = (0.0, 0)
        self._printed = 0.0

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitAgent)
        self._started = (time.perf_counter(), pl_module.frames)
        self._printed = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.perf_counter() - self._printed > self.every_seconds:
            self._print(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print(trainer, pl_module)
        if self._enabled and self.is_terminal:
            print()

    def _print(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._enabled or not trainer.is_global_zero:
            return
        assert isinstance(module, LitAgent)
        self._printed = time.perf_counter()
        since, frames_then = self._started
        speed = (module.frames - frames_then) / max(self._printed - since, 1e-9)
        parts = [f"{module.frames:,} / {module.total_frames:,} frames", f"{speed:,.0f} steps/s"]
        if module.recent_returns:
            mean = sum(module.recent_returns) / len(module.recent_returns)
            parts.append(f"return {mean:.1f} (last {len(module.recent_returns)} episodes)")
        evaluated = trainer.callback_metrics.get("val/return")
        if evaluated is not None:
            parts.append(f"evaluation {evaluated:.1f}")
        line = "  ".join(parts)
        print(
            f"\r\033[K{line}" if self.is_terminal else line, end="" if self.is_terminal else "\n", flush=True
        )
