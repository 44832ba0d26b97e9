"""``lit-rl trunks list | check NAME [--learn] | new NAME``.

`list` and `new` read package metadata only; torch is imported when `check` runs.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_rl import registry
from lit_rl.errors import UserError
from lit_rl.messages import CommandParser
from lit_rl.registry import TrunkEntry
from lit_rl.scaffold import write_plugin


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code.

    Raises:
        UserError: bad input, in one line.
    """
    arguments = _parser().parse_args(argv)
    return arguments.command(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="lit-rl trunks", description="Installed trunks: names, checks, new ones.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="every registered trunk, from package metadata alone")
    listing.set_defaults(command=_list)

    check = commands.add_parser("check", help="hold a trunk to the contract, a line for each check")
    check.add_argument("name", metavar="NAME", help="name, package/name, or class path pkg.mod.Class")
    check.add_argument(
        "--option", metavar="KEY=VALUE", action="append", default=[], help="constructor argument"
    )
    check.add_argument("--learn", action="store_true", help="the memory ladder instead: PPO beside others")
    check.add_argument("--seed", type=int, metavar="N", help="with --learn (default: 1)")
    check.add_argument("--frames", type=int, metavar="N", help="with --learn: the budget of every run")
    check.add_argument("--csv", type=Path, metavar="FILE", help="with --learn: where the runs are kept")
    check.set_defaults(command=_check)

    new = commands.add_parser("new", help="write a plugin package with a working trunk and its test")
    new.add_argument("name", metavar="NAME", help="the trunk's name; the package is lit-rl-NAME")
    new.add_argument(
        "--path", metavar="DIR", type=Path, default=Path(), help="where to write (default: here)"
    )
    new.set_defaults(command=_new)
    return parser


def _list(_: argparse.Namespace) -> int:
    entries = registry.entries()
    rows = [("NAME", "PACKAGE", "VERSION", "CLASS", "STATUS")]
    rows += [(e.name, e.package, e.version, e.target, _status(e, entries)) for e in entries]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _status(entry: TrunkEntry, entries: list[TrunkEntry]) -> str:
    """What metadata shows: a clash of names, a target that cannot be right, or ok."""
    try:
        module, _ = registry.split_target(entry)
    except UserError:
        return "broken: target is not pkg.mod:Class"
    if not _is_installed(module.partition(".")[0]):
        return "broken: module not found"
    others = [e.package for e in entries if e.name == entry.name and e.package != entry.package]
    if others:
        return f"clash with {', '.join(others)}: select {entry.package}/{entry.name}"
    return "ok"


def _is_installed(package: str) -> bool:
    # A top-level package is found without running any of it.
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _check(arguments: argparse.Namespace) -> int:
    trunk = registry.load(arguments.name)
    options = _options(arguments.option, trunk, arguments.name)
    ladder = {key: getattr(arguments, key) for key in ("seed", "frames", "csv")}
    ladder = {key: value for key, value in ladder.items() if value is not None}
    if ladder and not arguments.learn:
        raise UserError(f"--{next(iter(ladder))} goes with --learn: add it, or leave the other out")

    from lit_rl.testing import Subject, run_checks

    subject = Subject(trunk, options)
    try:
        subject.build()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"trunk {arguments.name!r} cannot be built with {options}: {reason}") from error
    if arguments.learn:
        from lit_rl.benchmarks.ladder import run, with_peers

        run(with_peers(arguments.name, options), **ladder)
        return 0
    counts: Counter[str] = Counter()
    for verdict in run_checks(subject):
        counts[verdict.outcome] += 1
        print(f"{verdict.outcome:8}{verdict.check}{': ' * bool(verdict.detail)}{verdict.detail}", flush=True)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if counts["failed"] else 0


def _options(assignments: list[str], trunk: type, name: str) -> dict[str, Any]:
    """``["n_layers=2"]`` to ``{"n_layers": 2}``; what is no Python literal is a string."""
    known = list(inspect.signature(trunk).parameters)[1:]
    options: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(
                f"--option {assignment!r} is not KEY=VALUE; write for example --option n_layers=2"
            )
        if key not in known:
            raise UserError(f"trunk {name!r} has no option {key!r}; it has {', '.join(known) or 'none'}")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def _new(arguments: argparse.Namespace) -> int:
    folder = write_plugin(arguments.name, arguments.path)
    print(f"wrote {folder}; next: pip install -e {folder} && pytest {folder}")
    return 0
