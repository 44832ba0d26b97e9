"""SIGTERM and Ctrl-C end training at a rollout's end, in all processes at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_rl.ranks import gather_list


class Stopped(SIGTERMException):
    """Training was stopped by a signal, between two rollouts."""

    def __init__(self, signum: int) -> None:
        self.signum = signal.Signals(signum)
        super().__init__(f"stopped by {self.signum.name}")


class StopOnSignal(L.Callback):
    """On SIGTERM or Ctrl-C the rollout in flight is finished and learnt from, then all ranks stop.

    Lightning's own handler talks to the other processes from inside the signal, which locks up where
    these are in the middle of an update. A second Ctrl-C stops at once, without a checkpoint.
    """

    def __init__(self) -> None:
        self._former: dict[int, Any] = {}
        self._received = 0
        self._at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            self._former = {
                number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
            }

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # Launchers pass on what a terminal sends to everyone: two within a second are one.
        if self._received and signum == signal.SIGINT and time.monotonic() - self._at > 1.0:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._at = signum, time.monotonic()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, b"\nstopping after this rollout\n")  # print may not be entered twice

    def _stop_if_told(self) -> None:
        received = max(gather_list([self._received]))
        if received:
            raise Stopped(received)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_if_told()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_told()  # told while evaluating

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore()
