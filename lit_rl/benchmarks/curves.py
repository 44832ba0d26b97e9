"""Runs of several seeds as one curve and one table.

``python -m lit_rl.benchmarks.curves logs/ppo_halfcheetah --out logs/benchmarks/ppo_halfcheetah`` reads the
TensorBoard events and configurations of a folder's runs, prints a table, writes `curve.csv` and `curve.png`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rl.callbacks.record import CURVES

Points = list[tuple[int, float]]  # environment frames, return


def read_run(run: Path) -> tuple[int, dict[str, Points]]:
    """A run's seed and its curves."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in CURVES}
    return yaml.safe_load((run / "config.yaml").read_text())["seed_everything"], curves


def last_mean(points: Points, share: float = 0.1) -> float:
    """Mean over the last tenth of a curve's frames."""
    start = points[-1][0] * (1 - share)
    return float(np.mean([value for step, value in points if step > start]))


def table(runs: dict[int, dict[str, Points]]) -> str:
    """Final returns a seed and over seeds, in Markdown."""
    rows = {
        seed: (curves["val/return"][-1][1], last_mean(curves["episode/return"]))
        for seed, curves in runs.items()
    }
    finals = np.array(list(rows.values()))
    lines = [
        "| seed | greedy evaluation at the end | training episodes, last tenth |",
        "|---|---|---|",
        *(f"| {seed} | {final:.0f} | {train:.0f} |" for seed, (final, train) in rows.items()),
        "| mean +- std | " + " | ".join(f"{of.mean():.0f} +- {of.std():.0f}" for of in finals.T) + " |",
    ]
    return "\n".join(lines) + "\n"


def draw(runs: dict[int, dict[str, Points]], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for seed, curves in runs.items():
        axes.plot(*zip(*curves["val/return"], strict=True), marker="o", markersize=3, label=f"seed {seed}")
    axes.set(xlabel="environment frames", ylabel="return (greedy evaluation)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs of several seeds as one curve and one table.")
    parser.add_argument("runs", type=Path, help="the folder of the runs, logs/NAME")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs = dict(sorted(read_run(run.parent) for run in arguments.runs.glob("*/config.yaml")))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("seed", "curve", "frames", "return"))
        for seed, curves in runs.items():
            for tag, points in curves.items():
                # Training episodes of every tenth rollout tell enough.
                kept = points[:: 10 if tag == "episode/return" else 1]
                writer.writerows((seed, tag, step, round(value, 1)) for step, value in kept)
    draw(runs, arguments.runs.name, arguments.out / "curve.png")
    print(table(runs), end="")


if __name__ == "__main__":
    main()
