"""Training speed beside a peer, turn about, each run in a process of its own as a user would start it.

Lightning sets an environment variable that would slow the peer down, and what one run leaves behind (threads,
caches) is no business of the next. Ratios are of runs that stand side by side; their median is told.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

SpeedOf = Callable[[int, int], float]  # frames, seed -> environment steps a second


def times_of_fit(model: L.LightningModule, data: L.LightningDataModule) -> list[float]:
    """Seconds at which each batch had been learnt from; TensorBoard is written, as in every run."""
    marks: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as logs:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            limit_val_batches=0,
            logger=TensorBoardLogger(logs),
            callbacks=[Clock()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
    return marks


def times_of_learn(model: Any, frames: int) -> list[float]:
    """The same of a model of stable-baselines3: a rollout begins when the last was learnt from."""
    from stable_baselines3.common.callbacks import BaseCallback

    marks: list[float] = []

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            marks.append(time.perf_counter())

        def _on_step(self) -> bool:
            return True

    model.learn(frames, callback=Clock())
    return [*marks[1:], time.perf_counter()]


def _in_a_process(module: str, which: str, frames: int, seed: int) -> float:
    command = [sys.executable, "-m", module, "--only", which, "--frames", str(frames), "--seed", str(seed)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def main(module: str, runs: Mapping[str, SpeedOf], peer: str, *, pairs: int, frames: int) -> None:
    """The command line of a benchmark: prints and keeps steps a second and their ratios to the peer's.

    Args:
        module: whose ``--only NAME`` prints the speed of one run in its last line.
        runs: by name, in the order in which they take turns.
        peer: the name of the run that the others are divided by.
        pairs: how many turns, unless told otherwise.
        frames: environment steps of a run, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=f"Training speed beside {peer}.")
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--frames", type=int, default=frames)
    parser.add_argument("--only", choices=runs, help="one run: print its steps a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="where the pairs are kept")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    if arguments.only:
        print(runs[arguments.only](arguments.frames, arguments.seed))
        return
    rows: list[dict[str, float]] = []
    for seed in range(arguments.pairs):
        speeds = {name: _in_a_process(module, name, arguments.frames, seed) for name in runs}
        ratios = {f"{name} / {peer}": speeds[name] / speeds[peer] for name in runs if name != peer}
        rows.append({"seed": seed} | {k: round(v) for k, v in speeds.items()} | ratios)
        print(", ".join(f"{name} {speed:,.0f} steps/s" for name, speed in speeds.items()), flush=True)
    for name in ratios:
        values = [row[name] for row in rows]
        print(f"{name}: median {statistics.median(values):.2f}, min {min(values):.2f}, max {max(values):.2f}")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({key: round(value, 3) for key, value in row.items()} for row in rows)
