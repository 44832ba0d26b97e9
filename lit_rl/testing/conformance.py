"""The conformance kit: holds any trunk to the contract in `lit_rl.trunks.base`.

Under pytest, subclass one class::

    class TestMyTrunk(TrunkConformance):
        trunk = MyTrunk
        options = [{}, {"n_layers": 2}]

From the command line: ``lit-rl trunks check NAME``. The checks themselves are in `trunk_checks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from unittest import SkipTest

from lit_rl.testing.trunk_checks import CHECKS, Check, Subject
from lit_rl.trunks.base import Trunk


@dataclass(frozen=True)
class Verdict:
    """What became of one check; `detail` is the deviation and its place, or why it was skipped."""

    check: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str = ""


def run_checks(subject: Subject) -> Iterator[Verdict]:
    """Run every check, one after the other; a check that fails does not stop the rest."""
    for check in CHECKS:
        name = check_name(check)
        try:
            check(subject)
        except SkipTest as skip:
            yield Verdict(name, "skipped", str(skip))
        except AssertionError as failure:
            yield Verdict(name, "failed", str(failure))
        except Exception as error:  # a wrong trunk may raise anything, anywhere
            yield Verdict(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
        else:
            yield Verdict(name, "passed")


def check_name(check: Check) -> str:
    return check.__name__.removeprefix("check_").replace("_", " ")


class TrunkConformance:
    """Subclass under pytest with `trunk` and `options`: every check runs under every set of options."""

    trunk: ClassVar[type[Trunk]]
    options: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    in_features: ClassVar[int] = 5

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Called by pytest for each test of the class."""
        if {"check", "subject"} <= set(metafunc.fixturenames):
            subjects = [Subject(self.trunk, options, self.in_features) for options in self.options]
            named = [",".join(f"{k}={v}" for k, v in o.items()) or "defaults" for o in self.options]
            metafunc.parametrize("subject", subjects, ids=named)
            metafunc.parametrize("check", CHECKS, ids=check_name)

    def test_conformance(self, subject: Subject, check: Check) -> None:
        check(subject)
