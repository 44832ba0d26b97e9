"""What the benchmarks of trunks share: which trunks there are, and what a pass of one costs.

Imports torch, tensordict, numba and trunks only, so that it runs where nothing else is installed.

Shapes: B rows, T time steps.
"""

from __future__ import annotations

import csv
import inspect
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rl import registry
from lit_rl.errors import UserError
from lit_rl.testing.trunk_checks.runs import inputs_from_start, leaves
from lit_rl.trunks import Trunk

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Contender:
    """A trunk with its options, under the name that a table calls it."""

    name: str
    trunk: type[Trunk]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def named(cls, name: str, **options: Any) -> Contender:
        """By registered name or class path (``pkg.mod.Class`` or ``pkg.mod:Class``).

        Raises:
            UserError: see `registry.load`.
        """
        return cls(name, registry.load(name.replace(":", ".")), options)

    def with_usual(self, **usual: Any) -> Contender:
        """With these options as well, but for those that were given or that the trunk does not know."""
        known = inspect.signature(self.trunk).parameters
        kept = {key: value for key, value in usual.items() if key in known}
        return replace(self, options={**kept, **self.options})

    def build(self, in_features: int, seed: int = 0) -> Trunk:
        """A fresh trunk in evaluation mode.

        Raises:
            UserError: its constructor refuses the options.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return self.trunk(in_features, **self.options).eval()
            except Exception as error:  # somebody else's constructor
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                raise UserError(
                    f"trunk {self.name!r} cannot be built with {self.options}: {cause}"
                ) from error


def contenders(names: Sequence[str]) -> list[Contender]:
    """The trunks of these names; without names all that are registered, less those that are broken.

    Raises:
        UserError: a name leads to no trunk, or there is none at all.
    """
    if names:
        return [Contender.named(name) for name in names]
    entries = registry.entries()
    known = [entry.name for entry in entries]
    found = []
    for entry in entries:
        name = entry.name if known.count(entry.name) == 1 else f"{entry.package}/{entry.name}"
        try:
            found.append(Contender.named(name))
        except UserError as reason:
            print(f"left out: {reason}")
    if not found:
        raise UserError("no trunk is registered here: name classes, pkg.mod:Class, on PYTHONPATH")
    return found


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def state_bytes(trunk: Trunk) -> int:
    """What the memory of one row takes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(trunk.initial_state(1)).values())


# ---------------------------------------------------------------------- passes to be timed


def random_resets(rows: int, steps: int, share: float, seed: int = 0) -> Tensor:
    """`is_init` ``[B, T]`` that is true at this share of the steps after the first."""
    chance_BT = torch.rand(rows, steps, generator=torch.Generator().manual_seed(seed))
    chance_BT[:, 0] = 1.0
    return chance_BT < share


def forward_backward(trunk: Trunk, is_init_BT: Tensor) -> Callable[[], None]:
    """One pass over T steps and the gradients of all parameters, as one update does it."""
    inputs = inputs_from_start(trunk, is_init_BT)

    def run() -> None:
        y_BTD, _ = trunk(inputs.x, inputs.state, inputs.is_init)
        y_BTD.sum().backward()
        trunk.zero_grad(set_to_none=True)

    return run


def acting(trunk: Trunk, rows: int) -> Callable[[], None]:
    """One acting step, T = 1, of B environments; the memory goes on from call to call."""
    inputs = inputs_from_start(trunk, torch.zeros(rows, 1, dtype=torch.bool))
    memory = [inputs.state]

    def run() -> None:
        with torch.inference_mode():
            _, memory[0] = trunk(inputs.x, memory[0], inputs.is_init)

    return run


def peak_bytes(case: Callable[[], object], device: str) -> int:
    """Most memory that a call holds at once, of what it allocates itself; on the CPU by torch's profiler."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of every start and stop
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        case()
    events = profile.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


def interleaved(cases: Mapping[Any, Callable[[], object]], rounds: int, calls: int = 1) -> dict[Any, float]:
    """Median seconds of a call of each case; every round runs them all, so that all share what else goes on.

    Args:
        cases: what to time, by any key.
        rounds: how often; two more go before, uncounted.
        calls: consecutive calls a round, timed together.
    """
    seconds: dict[Any, list[float]] = {key: [] for key in cases}
    for number in range(-2, rounds):
        for key, case in cases.items():
            _synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                case()
            _synchronize()
            if number >= 0:
                seconds[key].append((time.perf_counter() - start) / calls)
    return {key: statistics.median(values) for key, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---------------------------------------------------------------------- tables


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table with aligned columns; numbers with three significant digits."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def check_csv(path: Path | None) -> None:
    """Raises `UserError` where a table could not be kept, before the work is done rather than after."""
    if path is not None and not path.parent.is_dir():
        raise UserError(f"--csv {path}: there is no folder {path.parent}; make it or choose another")
    if path is not None and path.is_dir():
        raise UserError(f"--csv {path} is a folder: name a file in it")
