"""When warm-up ends and when the measurement does."""

from __future__ import annotations

import time

WARM_UP = 2  # batches that are learnt from


class Clock:
    """Measures for so many seconds after `WARM_UP` batches."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.frames = 0
        """counted so far"""
        self.elapsed = 0.0
        """seconds that they took"""
        self._batches = 0
        self._started: float | None = None

    def batch(self, frames: int) -> None:
        """So many frames have been collected and learnt from."""
        now = time.perf_counter()
        self._batches += 1
        if self._batches == WARM_UP:
            self._started = now
        elif self._started is not None:
            self.frames += frames
            self.elapsed = now - self._started

    @property
    def has_started(self) -> bool:
        return self._started is not None

    @property
    def is_over(self) -> bool:
        return self.elapsed >= self.seconds

    @property
    def speed(self) -> float:
        """Frames a second."""
        return self.frames / self.elapsed
