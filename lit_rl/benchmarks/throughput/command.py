"""``lit-rl bench throughput``: measures turn about, each in a process of its own, and what came out."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from lit_rl.arguments import check_folder
from lit_rl.benchmarks.throughput.report import Turn, write
from lit_rl.errors import UserError
from lit_rl.messages import CommandParser

PEERS = {"sb3": "stable-baselines3"}
MEASURES = ("lit_rl", "environment", "bare loop", *PEERS.values())


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code.

    Raises:
        UserError: bad input, in one line.
    """
    arguments = _parser().parse_args(argv)
    for config in arguments.configs:
        if not config.is_file():
            raise UserError(f"there is no configuration {config}: name YAML files")
    if arguments.pairs < 1 or arguments.seconds <= 0 or arguments.torch_threads < 1:
        raise UserError("--pairs, --seconds and --torch_threads must be above 0")
    if arguments.out is not None:
        check_folder(arguments.out)
    if arguments.only:
        measured = _measure(arguments.only, arguments.configs[0], arguments.seconds, arguments.torch_threads)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others of a run with several say nothing
            print(json.dumps(measured), flush=True)
        return 0
    measures = ["lit_rl"] if arguments.no_ceilings else ["lit_rl", "environment", "bare loop"]
    if arguments.peer:
        measures.append(PEERS[arguments.peer])
    turns = list(_turns(measures, arguments))
    write(turns, PEERS.get(arguments.peer), arguments.out, _settings(arguments))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="lit-rl bench", description="What training costs, and where the time goes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    throughput = commands.add_parser("throughput", help="steps a second of whole training runs")
    throughput.add_argument("configs", metavar="CONFIG", type=Path, nargs="+", help="YAML of a run")
    throughput.add_argument("--peer", choices=PEERS, help="the same settings in another library as well")
    throughput.add_argument("--no_ceilings", action="store_true", help="only the runs (and the peer's)")
    throughput.add_argument("--pairs", type=int, default=3, metavar="N", help="turns (default: 3)")
    throughput.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each (default: 10)")
    throughput.add_argument("--torch_threads", type=int, default=1, metavar="N", help="default: 1")
    throughput.add_argument("--out", type=Path, metavar="DIR", help="for table, CSV, JSON and picture")
    throughput.add_argument("--only", choices=MEASURES, help="one measure, once; JSON in the last line")
    return parser


def _measure(measure: str, config: Path, seconds: float, torch_threads: int) -> dict[str, float]:
    """One measure in this process."""
    from lit_rl.benchmarks.throughput import ceilings, ours, peers

    if measure == "lit_rl":
        return ours.fit(config, seconds=seconds, torch_threads=torch_threads)
    of_run = {
        "environment": ceilings.environment_alone,
        "bare loop": ceilings.bare_loop,
        "stable-baselines3": peers.stable_baselines3,
    }
    return of_run[measure](ours.build(config, torch_threads), seconds)


def _turns(measures: Sequence[str], arguments: argparse.Namespace) -> Iterable[Turn]:
    left_out = set()  # there is not a bare loop and a peer for everything
    for number in range(1, arguments.pairs + 1):
        for config in arguments.configs:
            measured = {}
            for measure in measures:
                if (config, measure) in left_out:
                    continue
                try:
                    measured[measure] = _in_a_process(measure, config, arguments)
                except UserError as reason:
                    if measure in ("lit_rl", "environment"):
                        raise
                    left_out.add((config, measure))
                    print(f"left out: {reason}", flush=True)
            speeds = ", ".join(f"{name} {found['steps/s']:,.0f}" for name, found in measured.items())
            print(f"{config.stem}, turn {number}, steps/s: {speeds}", flush=True)
            yield Turn(config.stem, number, measured)


def _in_a_process(measure: str, config: Path, arguments: argparse.Namespace) -> dict[str, float]:
    threads = str(arguments.torch_threads)
    options = ["--only", measure, "--seconds", str(arguments.seconds), "--torch_threads", threads]
    command = [sys.executable, "-m", "lit_rl", "bench", "throughput", str(config.resolve()), *options]
    start = time.time()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads}, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{measure} of {config.name} failed: {reason.removeprefix('lit-rl: error: ')}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if "first step at" in measured:
        measured["first step"] = measured.pop("first step at") - start
    return measured


def _settings(arguments: argparse.Namespace) -> str:
    """The command and what it ran on, in a line."""
    import torch

    configs = " ".join(map(str, arguments.configs))
    peer = f" --peer {arguments.peer}" if arguments.peer else ""
    ceilings = " --no_ceilings" if arguments.no_ceilings else ""
    return (
        f"lit-rl bench throughput {configs}{peer}{ceilings} --pairs {arguments.pairs} "
        f"--seconds {arguments.seconds:g} --torch_threads {arguments.torch_threads}: "
        f"{os.cpu_count()} CPU cores, torch {torch.__version__}"
    )
