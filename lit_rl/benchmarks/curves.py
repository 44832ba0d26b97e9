"""Runs of several seeds and settings as one curve and one table.

``python -m lit_rl.benchmarks.curves logs/ppo_halfcheetah --out logs/benchmarks/ppo_halfcheetah`` reads the
TensorBoard events and configurations of the runs in one or more folders, prints a table, writes `curve.csv`
and `curve.png`. ``--metric success`` draws successes in the place of returns. Runs of one name are taken for
seeds of one experiment, so give experiments names of their own. Several seeds are summed up as
mean, interquartile mean and the 95 % bootstrap interval of the mean (Agarwal et al. 2021, arXiv 2108.13264).
Columns of training are means over records, each the mean of the episodes that ended in it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rl.errors import UserError, refused

Points = list[tuple[int, float]]  # environment frames, value


@dataclass(frozen=True)
class Run:
    """What became of one seed of one experiment."""

    name: str
    seed: int
    evaluation: Points
    """Means of greedy evaluations."""
    training: Points
    """Means of the training episodes of a record."""
    td_loss: Points
    """Where there is such a thing."""

    @classmethod
    def read(cls, folder: Path, metric: str) -> Run:
        """From ``logs/NAME/version_N``."""
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        tags = [f"{kind}/{metric}" for kind in ("val", "episode")]
        if not set(tags) <= set(events.Tags()["scalars"]):
            raise UserError(f"{folder} has no {' and '.join(tags)}: choose another --metric or run")
        if "train/td_loss" in events.Tags()["scalars"]:
            tags.append("train/td_loss")
        evaluation, training, *td_loss = (
            [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags
        )
        seed = yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"]
        return cls(folder.parent.name, seed, evaluation, training, td_loss[0] if td_loss else [])

    @property
    def final(self) -> float:
        return self.evaluation[-1][1]

    @property
    def last_tenth(self) -> float:
        """Mean of training over the last tenth of its frames."""
        return over_last_tenth(self.training)

    @property
    def whole_training(self) -> float:
        """Mean of training over all records."""
        return float(np.mean([value for _, value in self.training]))


def over_last_tenth(points: Points) -> float:
    start = 0.9 * points[-1][0]
    return float(np.mean([value for step, value in points if step > start]))


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest quarter (rounded down)."""
    cut = len(values) // 4
    return float(np.mean(sorted(values)[cut : len(values) - cut]))


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (resamples, len(values))).mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def table(runs: Sequence[Run], digits: int) -> str:
    """Final values of each seed, and over the seeds of a name, in Markdown."""
    columns = {
        "greedy evaluation at the end": lambda run: run.final,
        "training episodes, last tenth": lambda run: run.last_tenth,
        "training episodes, all": lambda run: run.whole_training,
    }
    losses = any(run.td_loss for run in runs)
    head = ["run", "seed", *columns, *(["TD loss, last tenth"] if losses else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        for run in mine:
            cells = [f"{value(run):.{digits}f}" for value in columns.values()]
            cells += [f"{over_last_tenth(run.td_loss):.3g}"] if run.td_loss else ["-"] * losses
            lines.append(f"| {name} | {run.seed} | {' | '.join(cells)} |")
        if len(mine) > 1:
            cells = [summary([value(run) for run in mine], digits) for value in columns.values()]
            lines.append(f"| {name} | mean, IQM, interval | {' | '.join(cells)} |{' - |' * losses}")
    return "\n".join(lines) + "\n"


def summary(values: Sequence[float], digits: int) -> str:
    low, high = bootstrap_interval(values)
    return (
        f"{np.mean(values):.{digits}f}, {interquartile_mean(values):.{digits}f}, "
        f"{low:.{digits}f} to {high:.{digits}f}"
    )


def draw(runs: Sequence[Run], metric: str, path: Path) -> None:
    """Evaluations over frames: a panel for each name, in it a line for each seed and a black one for their
    mean."""
    names = list(dict.fromkeys(run.name for run in runs))
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    width = 9.0 if columns == 1 else 3.5 * columns
    figure = Figure(figsize=(width, 1 + 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        mine = [run for run in runs if run.name == name]
        for run in mine:
            panel.plot(*zip(*run.evaluation, strict=True), marker="o", markersize=3, linewidth=0.8, alpha=0.7)
        if len(mine) > 1 and (mean := mean_evaluation(mine)):
            panel.plot(*zip(*mean, strict=True), color="black", linewidth=2)
        seeds = ", ".join(str(run.seed) for run in mine)
        panel.set_title(f"{name}\nseed{'s' * (len(mine) > 1)} {seeds}", fontsize="small")
        panel.grid(alpha=0.3)
    for panel in panels[len(names) - columns : len(names)]:  # the lowest of each column
        panel.tick_params(labelbottom=True)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("environment frames")
    figure.supylabel(f"{metric} (greedy evaluation)")
    figure.suptitle("a line for each seed, black: their mean", fontsize="small")
    figure.savefig(path, dpi=120)


def mean_evaluation(runs: Sequence[Run]) -> Points:
    """Over the seeds of a name, at the frames at which all were evaluated."""
    values = [dict(run.evaluation) for run in runs]
    shared = sorted(set(values[0]).intersection(*values[1:]))
    return [(frames, float(np.mean([value[frames] for value in values]))) for frames in shared]


def read_runs(folders: Sequence[Path], metric: str) -> list[Run]:
    """All runs ``folder/version_N`` by name and seed; raises `UserError` if there are none, or one twice."""
    runs: list[Run] = []
    for folder in folders:
        configs = list(folder.glob("*/config.yaml"))
        if not configs:
            raise UserError(
                f"{folder} holds no runs: name folders logs/NAME with version_N/config.yaml in them"
            )
        runs += [Run.read(config.parent, metric) for config in configs]
    runs.sort(key=lambda run: (run.name, run.seed))
    for run, following in pairwise(runs):
        if (run.name, run.seed) == (following.name, following.seed):
            raise UserError(
                f"{run.name} has seed {run.seed} twice: move one version_N away, or name it otherwise"
            )
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs of several seeds as one curve and one table.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, logs/NAME")
    parser.add_argument("--metric", choices=["return", "success"], default="return")
    parser.add_argument(
        "--digits", type=int, help="of the table; 2 for successes and 0 for returns if absent"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        runs = read_runs(arguments.runs, arguments.metric)
    except UserError as error:
        return refused("curves", error)
    digits = arguments.digits
    if digits is None:
        digits = 2 if arguments.metric == "success" else 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "seed", "curve", "frames", arguments.metric))
        for run in runs:
            for kind, points in (("evaluation", run.evaluation), ("training", run.training[::10])):
                # Training episodes of every tenth rollout tell enough.
                writer.writerows(
                    (run.name, run.seed, kind, step, round(value, digits + 1)) for step, value in points
                )
    draw(runs, arguments.metric, arguments.out / "curve.png")
    print(table(runs, digits), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
