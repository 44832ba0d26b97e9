"""Callbacks: what a run shows and leaves behind."""

from lit_rl.callbacks.attention import AttentionMaps
from lit_rl.callbacks.episodes import EpisodeWriter
from lit_rl.callbacks.progress import FrameProgress
from lit_rl.callbacks.record import RunLogger, RunRecord
from lit_rl.callbacks.stop import StopOnSignal, Stopped
from lit_rl.callbacks.video import EvaluationVideo

__all__ = [
    "AttentionMaps",
    "EpisodeWriter",
    "EvaluationVideo",
    "FrameProgress",
    "RunLogger",
    "RunRecord",
    "StopOnSignal",
    "Stopped",
]
