"""Every trunk on a CUDA device: is it right there, and what does it cost? ``make gpu-check``.

``python -m lit_rl.benchmarks.gpu_check [NAMES]`` needs torch, tensordict, numba and the trunks, nothing else.
A name is that of a registered trunk, or a class, ``pkg.mod:Class``. For each trunk, and each value of its
option `backend` if it has one:

- the conformance kit on the GPU (resets, gradients, bfloat16 autocast, compilation, ...), its tolerances
  ten times those of the CPU, and values and gradients beside the CPU's in float64;
- time (forward + backward of 128 steps, d_model 128, resets at 5 % of the steps) and peak memory, beside
  `lstm`, all with products in full float32.

A backend that does not run here, say for lack of a package, is not checked, and the table says why.

Exit code 0 if no check failed, 1 if one did, 2 where nothing was checked.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from lit_rl.benchmarks.measure import (
    Contender,
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
from lit_rl.testing import Subject, run_checks
from lit_rl.testing.trunk_checks.platforms import agrees_with_cpu, exact_products
from lit_rl.trunks import LSTM

D_MODEL, T = 128, 128
ROWS = (8, 64)
RESETS = 0.05
PEER = Contender("lstm", LSTM, {"d_model": D_MODEL})
NOT_CHECKED = "not checked: "


def variants(contender: Contender) -> Iterator[Contender]:
    """A trunk with its defaults, or once for each value of its option `backend`."""
    annotation = get_type_hints(contender.trunk.__init__).get("backend")
    if get_origin(annotation) is not Literal:
        yield contender
        return
    for backend in get_args(annotation):
        yield replace(contender, name=f"{contender.name} backend={backend}", options={"backend": backend})


def is_right(contender: Contender, device: str) -> str:
    """Runs all checks on `device`, prints those that fail, and returns how many did what."""
    subject = Subject(contender.trunk, contender.options, device=device)
    counts: Counter[str] = Counter()
    with exact_products():
        for verdict in run_checks(subject):
            # Its own check of CUDA starts from the CPU; here it is the one below, whatever the device.
            if verdict.check == "cuda":
                continue
            counts[verdict.outcome] += 1
            if verdict.outcome == "failed":
                print(f"{contender.name}: {verdict.check}: {verdict.detail}", flush=True)
        try:
            agrees_with_cpu(subject, device)
            counts["passed"] += 1
        except Exception as error:  # a wrong trunk may raise anything
            counts["failed"] += 1
            print(f"{contender.name}: beside the CPU: {one_line(error)}", flush=True)
    return f"{counts['passed']} passed, {counts['failed']} failed"


def costs(
    trunks: Sequence[Contender], names: Iterable[str], device: str, rounds: int
) -> dict[str, dict[str, float | str]]:
    """Columns of time and memory under each of `names`, beside the peer's; "-" where none were measured."""
    found: dict[str, dict[str, float | str]] = {name: {} for name in names}
    for rows in ROWS:
        seconds, peaks = measured(trunks, rows, device, rounds)
        for name, columns in found.items():
            numbers = {
                f"B={rows} ms": 1e3 * seconds.get(name, math.nan),
                f"B={rows} / lstm": seconds.get(name, math.nan) / seconds.get(PEER.name, math.nan),
                f"B={rows} MiB": peaks.get(name, math.nan) / 2**20,
                f"B={rows} MiB / lstm": peaks.get(name, math.nan) / peaks.get(PEER.name, math.nan),
            }
            columns |= {key: "-" if math.isnan(number) else number for key, number in numbers.items()}
    return found


def measured(
    trunks: Sequence[Contender], rows: int, device: str, rounds: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and peak bytes by name, of those that run with so many rows; what does not is printed."""
    is_init_BT = random_resets(rows, T, RESETS)
    cases: dict[str, Callable[[], None]] = {}
    with exact_products():
        for one in trunks:
            try:
                case = forward_backward(one.build(D_MODEL).to(device), is_init_BT)
                case()
            except Exception as error:  # memory may not do for so many rows
                print(f"{one.name}: no costs with B={rows}: {one_line(error)}", flush=True)
            else:
                cases[one.name] = case
        try:
            return interleaved(cases, rounds), {
                name: peak_bytes(case, device) for name, case in cases.items()
            }
        except Exception as error:  # verdicts must outlive it
            print(f"no costs with B={rows}: {one_line(error)}", flush=True)
            return {}, {}


def obstacle(contender: Contender, device: str) -> str:
    """Why one update cannot be made there; empty if it can."""
    try:
        forward_backward(contender.build(D_MODEL).to(device), random_resets(1, 2, 0.0))()
    except Exception as error:  # kernels that are not installed, or not for this device, say so in many ways
        return one_line(error)
    return ""


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_default(contender: Contender) -> bool:
    """Whether it has no backend to choose, or the one that it takes by itself."""
    parameters = inspect.signature(contender.trunk).parameters
    return all(parameters[key].default == value for key, value in contender.options.items())


def check(trunks: Sequence[Contender], device: str, rounds: int = 20) -> list[dict[str, Any]]:
    """A row for each trunk and backend, the peer first."""
    others = [variant for one in trunks if one.trunk is not PEER.trunk for variant in variants(one)]
    verdicts: dict[str, str] = {}
    running: list[Contender] = []
    for one in (PEER, *others):
        if reason := obstacle(one, device):
            print(f"{one.name} does not run here: {reason}", flush=True)
            verdicts[one.name] = "0 passed, 1 failed" if is_default(one) else NOT_CHECKED + reason
        else:
            verdicts[one.name] = is_right(one, device)
            running.append(one)
    found = costs([one.with_usual(d_model=D_MODEL) for one in running], verdicts, device, rounds)
    return [{"trunk": name, "checks": verdict, **found[name]} for name, verdict in verdicts.items()]


def summary(rows: Sequence[dict[str, Any]]) -> tuple[str, int]:
    """One line that counts the rows of a table by their checks, and the exit code."""
    verdicts = [row["checks"] for row in rows]
    unchecked = sum(verdict.startswith(NOT_CHECKED) for verdict in verdicts)
    right = sum(verdict.endswith(" 0 failed") for verdict in verdicts)
    failed = len(verdicts) - unchecked - right
    return f"{right} right, {failed} failed, {unchecked} not checked", int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Every trunk on a CUDA device: checks, time and memory.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="default: every registered trunk")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where the table is kept")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked")
        return 2
    try:
        check_csv(arguments.csv)
        rows = check(contenders(arguments.names), "cuda")
    except UserError as error:
        return refused("gpu_check", error)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{markdown(rows)}")
    if arguments.csv is not None:
        write_csv(arguments.csv, rows)
    line, exit_code = summary(rows)
    print(f"\n{line}")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
