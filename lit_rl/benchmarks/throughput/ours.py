"""One run of `lit-rl fit`, timed from inside."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L

from lit_rl import cli
from lit_rl.algorithms import LitDQN, LitPPO
from lit_rl.benchmarks.throughput.clock import Clock
from lit_rl.collectors import RolloutCollector, WindowCollector
from lit_rl.workers import Workers

# The methods of which each phase consists. What is left is Lightning's loop and what surrounds it.
PHASES: dict[str, tuple[tuple[type, str], ...]] = {
    "collecting": ((RolloutCollector, "rollout"), (WindowCollector, "rollout"), (Workers, "rollout")),
    "advantages": ((LitPPO, "_add_advantages"),),
    "learning": ((LitPPO, "_learn"), (LitDQN, "_learn")),
    "logging": ((LitPPO, "_log_rollout"), (LitDQN, "_log_block")),
}
ENDLESS = 10**9  # frames


def build(config: Path, torch_threads: int) -> cli.LitRLCLI:
    """What `lit-rl fit` would run, without evaluation, checkpoints, progress bar and an end.

    Raises:
        UserError: the configuration does not fit.
    """
    options = {
        "config": config,
        "torch_threads": torch_threads,
        "model.total_frames": ENDLESS,
        "data.frames_per_epoch": ENDLESS,
        "trainer.limit_val_batches": 0,
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
    }
    return cli.build(["fit", *(f"--{key}={value}" for key, value in options.items())])


def fit(config: Path, *, seconds: float, torch_threads: int) -> dict[str, float]:
    """Steps a second, those of collecting alone, each phase's share, and when the first step was taken."""
    clock = Clock(seconds)
    spent, first_step = dict.fromkeys(PHASES, 0.0), 0.0

    def timed(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal first_step
            if phase == "collecting":
                first_step = first_step or time.time()
            start = time.perf_counter()
            result = method(*args, **kwargs)
            spent[phase] += time.perf_counter() - start
            return result

        return run

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            if not spent["learning"]:  # a replay is still filled
                return
            had_started, before = clock.has_started, getattr(self, "frames", 0)
            self.frames = module.frames
            clock.batch(module.frames - before)
            if clock.has_started and not had_started:
                spent.update(dict.fromkeys(spent, 0.0))
            trainer.should_stop = trainer.strategy.reduce_boolean_decision(clock.is_over, all=False)

    for phase, methods in PHASES.items():
        for owner, name in methods:
            setattr(owner, name, timed(phase, getattr(owner, name)))
    config = config.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # for its logs
        run = build(config, torch_threads)
        run.trainer.callbacks.append(Stop())  # type: ignore[attr-defined]
        run.run()
    shares = {phase: time_of / clock.elapsed for phase, time_of in spent.items()}
    return {
        "steps/s": clock.speed,
        "collecting steps/s": clock.frames / spent["collecting"],
        **shares,
        "rest": 1 - sum(shares.values()),
        "first step at": first_step,
    }
