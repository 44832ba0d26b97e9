"""What trunks cost on one CPU thread, beside `nn.LSTM`: ``python -m lit_rl.benchmarks.trunk_speed [NAMES]``.

One layer, d_model 128, 8 rows; times are medians of rounds in which all trunks take turns, so that their
ratios hold on a machine with other work to do.

- ms: forward + backward of 128 steps without resets; beside `nn.LSTM` of the same width, which has none.
- resets: the same with resets at 5 % of the steps, beside without.
- linear time, linear memory: a step of 4096 beside a step of 128, time and peak memory; 1 is linear in T.
- act: one step (T = 1) of 1 and of 16 rows, ms.

Shapes: B rows, T time steps, D features.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_rl.benchmarks.measure import (
    Contender,
    acting,
    check_csv,
    contenders,
    forward_backward,
    interleaved,
    markdown,
    peak_bytes,
    random_resets,
    write_csv,
)
from lit_rl.errors import UserError, refused
from lit_rl.trunks import Trunk

B, D_MODEL = 8, 128
RESETS = 0.05
ACTING_ROWS = (1, 16)
PEER = "nn.LSTM"


def peer(steps: int) -> Callable[[], None]:
    """Forward and backward of `nn.LSTM`, without resets."""
    lstm = nn.LSTM(D_MODEL, D_MODEL, batch_first=True)
    x_BTD = torch.randn(B, steps, D_MODEL)

    def run() -> None:
        lstm(x_BTD)[0].sum().backward()
        lstm.zero_grad(set_to_none=True)

    return run


def measure(trunks: dict[str, Trunk], *, steps: int, long: int, rounds: int) -> list[dict[str, Any]]:
    """A row of numbers for each trunk.

    Args:
        trunks: by name; what they are built for is D_MODEL features.
        steps: T of the short sequences.
        long: T of the long ones.
        rounds: see `interleaved`; long sequences take a fifth of it, but five.
    """
    short: dict[tuple[str, str], Callable[[], None]] = {(PEER, "plain"): peer(steps)}
    for name, trunk in trunks.items():
        short[name, "plain"] = forward_backward(trunk, random_resets(B, steps, 0.0))
        short[name, "resets"] = forward_backward(trunk, random_resets(B, steps, RESETS))
    seconds = interleaved(short, rounds)
    # Short ones once more among the long ones: only what takes turns is compared.
    at_length: dict[tuple[str, str], Callable[[], None]] = {}
    for name, trunk in trunks.items():
        at_length[name, "short"] = short[name, "plain"]
        at_length[name, "long"] = forward_backward(trunk, random_resets(B, long, 0.0))
    long_seconds = interleaved(at_length, max(min(rounds, 5), rounds // 5))
    acts = {(name, rows): acting(trunk, rows) for name, trunk in trunks.items() for rows in ACTING_ROWS}
    act_seconds = interleaved(acts, rounds, calls=20)

    table: list[dict[str, Any]] = []
    for name in trunks:
        plain = seconds[name, "plain"]
        short_peak, long_peak = (peak_bytes(at_length[name, which], "cpu") for which in ("short", "long"))
        table.append(
            {
                "trunk": name,
                "ms": 1e3 * plain,
                f"/ {PEER}": plain / seconds[PEER, "plain"],
                "resets": seconds[name, "resets"] / plain,
                "linear time": long_seconds[name, "long"] / long_seconds[name, "short"] * steps / long,
                "linear memory": long_peak / short_peak * steps / long,
                **{f"act {rows}": 1e3 * act_seconds[name, rows] for rows in ACTING_ROWS},
            }
        )
    return table


def one_layer(contender: Contender) -> Trunk:
    """The trunk with one layer; with its own number of layers where it refuses that."""
    try:
        return contender.with_usual(n_layers=1).build(D_MODEL)
    except UserError as reason:
        trunk = contender.build(D_MODEL)
        print(f"{contender.name} keeps its own number of layers: {reason}")
        return trunk


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What trunks cost on one CPU thread, beside nn.LSTM.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="default: every registered trunk")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where the table is kept")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="of which the median is taken")
    parser.add_argument("--quick", action="store_true", help="one round of short sequences: does it run?")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = {"steps": 128, "long": 4096, "rounds": max(1, arguments.rounds)}
    try:
        check_csv(arguments.csv)
        named = [one.with_usual(d_model=D_MODEL) for one in contenders(arguments.names)]
        trunks = {one.name: one_layer(one) for one in named}
    except UserError as error:
        return refused("trunk_speed", error)
    rows = measure(trunks, **(sizes | ({"steps": 16, "long": 64, "rounds": 1} if arguments.quick else {})))
    print(markdown(rows))
    if arguments.csv is not None:
        write_csv(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
