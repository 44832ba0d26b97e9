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
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

SpeedOf = Callable[[int, int], float]  # frames, seed -> environment steps a second


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
