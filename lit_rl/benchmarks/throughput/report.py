"""Turns as a table, as CSV and JSON, and as a picture."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

SHARES = ("collecting", "advantages", "learning", "logging", "rest")


class Turn(NamedTuple):
    """What one turn over all measures of a configuration found."""

    config: str
    number: int
    measured: dict[str, dict[str, float]]
    """by measure; steps a second, and of the run itself the share of each phase"""


def write(turns: Sequence[Turn], peer: str | None, out: Path | None, settings: str) -> None:
    """Prints the table; keeps everything in the folder `out` where there is one."""
    text = f"{settings}\n\n{table(turns, peer)}"
    print(f"\n{text}", end="")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text)
    rows = [
        {"config": turn.config, "turn": turn.number, "measure": measure, **found}
        for turn in turns
        for measure, found in turn.measured.items()
    ]
    (out / "turns.json").write_text(json.dumps({"settings": settings, "turns": rows}, indent=1) + "\n")
    with (out / "turns.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    draw(turns, out / "throughput.png")


def table(turns: Sequence[Turn], peer: str | None) -> str:
    """Medians over the turns of each configuration, ratios with their range; in Markdown."""
    head = ["configuration", "steps/s", *SHARES, "first step, s"]
    head += ["environment alone", "bare loop", "/ bare loop", "collecting", "/ bare loop's"]
    head += [] if peer is None else [peer, f"/ {peer}"]
    lines = [head, ["---"] * len(head)]
    for config, mine in _by_config(turns).items():
        row = [config, _median(mine, "lit_rl", "steps/s", ",.0f")]
        row += [_median(mine, "lit_rl", share, ".1%") for share in SHARES]
        row += [_median(mine, "lit_rl", "first step", ".1f")]
        row += [_median(mine, "environment", "steps/s", ",.0f")]
        row += [_median(mine, "bare loop", "steps/s", ",.0f"), _ratio(mine, "bare loop", "steps/s")]
        row += [_median(mine, "lit_rl", "collecting steps/s", ",.0f")]
        row += [_ratio(mine, "bare loop", "collecting steps/s")]
        if peer is not None:
            row += [_median(mine, peer, "steps/s", ",.0f"), _ratio(mine, peer, "steps/s")]
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _median(turns: Sequence[Turn], measure: str, key: str, form: str) -> str:
    found = [turn.measured[measure][key] for turn in turns if measure in turn.measured]
    return format(statistics.median(found), form) if found else "-"


def _ratio(turns: Sequence[Turn], measure: str, key: str) -> str:
    """Ours over that of `measure`, turn by turn: the median and the range."""
    found = [t.measured["lit_rl"][key] / t.measured[measure][key] for t in turns if measure in t.measured]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else "-"


def draw(turns: Sequence[Turn], path: Path) -> None:
    """Microseconds a step, by phase, beside those of the other measures."""
    by_config = _by_config(turns)
    figure = Figure(figsize=(9, 1.2 + 1.1 * len(by_config)), layout="constrained")
    axes = figure.subplots(len(by_config), squeeze=False)[:, 0]
    for axis, (config, mine) in zip(axes, by_config.items(), strict=True):
        for measure in mine[0].measured:
            micros = statistics.median(1e6 / turn.measured[measure]["steps/s"] for turn in mine)
            if measure != "lit_rl":
                axis.barh(measure, micros, color="0.75")
                continue
            left = 0.0
            for number, share in enumerate(SHARES):
                width = micros * statistics.median(turn.measured[measure][share] for turn in mine)
                axis.barh(measure, width, left=left, color=f"C{number}", label=share)
                left += width
        axis.invert_yaxis()
        axis.set(title=config, xlabel="microseconds an environment step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def _by_config(turns: Sequence[Turn]) -> dict[str, list[Turn]]:
    found: dict[str, list[Turn]] = {}
    for turn in turns:
        found.setdefault(turn.config, []).append(turn)
    return found
