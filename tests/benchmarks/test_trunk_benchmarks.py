"""The benchmarks of trunks run, print all they promise, and need no more than they say."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.benchmarks import gpu_check, measure, trunk_speed
from lit_rl.benchmarks.measure import Contender
from lit_rl.errors import UserError
from lit_rl.testing.trunk_checks import CHECKS
from lit_rl.trunks import GRU, LSTM, MLP

torch.set_num_threads(1)


# ------------------------------------------------------------------ what they share


def test_names_and_class_paths_lead_to_trunks() -> None:
    for name in ("gru", "lit-rl/gru", "lit_rl.trunks.GRU", "lit_rl.trunks:GRU"):
        assert Contender.named(name).trunk is GRU
    assert {"mlp", "lstm", "gru"} <= {one.name for one in measure.contenders([])}


def test_where_nothing_is_registered_classes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where packages merely stand on PYTHONPATH."""
    monkeypatch.setattr(measure.registry, "entries", list)
    with pytest.raises(UserError, match="no trunk is registered here: name classes"):
        measure.contenders([])
    assert [one.trunk for one in measure.contenders(["lit_rl.trunks:GRU"])] == [GRU]


def test_usual_options_are_for_trunks_that_know_them_and_yield_to_given_ones() -> None:
    assert Contender.named("gru").with_usual(d_model=5, depth=3).options == {"d_model": 5}
    assert Contender.named("gru", d_model=7).with_usual(d_model=5).options == {"d_model": 7}


def test_rounds_take_turns() -> None:
    called: list[str] = []
    cases = {name: lambda name=name: called.append(name) for name in "ab"}
    assert measure.interleaved(cases, rounds=3, calls=2).keys() == {"a", "b"}
    assert called == list("aabb") * 5  # two rounds uncounted


def test_peak_is_what_a_call_holds_at_once() -> None:
    def case() -> None:
        for _ in range(3):
            torch.ones(100, 1000).add_(1)  # one after the other: 400,000 bytes at a time

    assert 400_000 <= measure.peak_bytes(case, "cpu") < 500_000


def test_memory_of_a_trunk_by_hand() -> None:
    lstm = Contender.named("lstm", d_model=8, n_layers=2).build(3)
    assert measure.state_bytes(lstm) == 2 * 2 * 8 * 4  # h and c, two layers
    assert measure.num_parameters(nn.Linear(3, 5)) == 20


def test_markdown_aligns_and_rounds() -> None:
    table = measure.markdown(
        [{"trunk": "a", "ms": 0.012345, "n": 12345}, {"trunk": "bcdefg", "ms": 1234.5, "n": 1}]
    )
    assert table.splitlines() == [
        "| trunk  | ms     | n      |",
        "|--------|--------|--------|",
        "| a      | 0.0123 | 12,345 |",
        "| bcdefg | 1,234  | 1      |",
    ]


# ------------------------------------------------------------------ trunk_speed


def test_trunk_speed_prints_and_keeps_a_row_for_each_trunk(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert trunk_speed.main(["mlp", "lstm", "--quick", "--csv", str(tmp_path / "table.csv")]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    columns = ["trunk", "ms", "/ nn.LSTM", "resets", "linear time", "linear memory", "act 1", "act 16"]
    assert [cell.strip() for cell in header.strip("|").split("|")] == columns
    assert [row.split()[1] for row in rows] == ["mlp", "lstm"]
    kept = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert list(kept[0]) == columns
    assert all(float(row[column]) > 0 for row in kept for column in columns[1:])


class Quadratic(MLP):
    """Holds a number for each pair of steps."""

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        pairs_BTT = x @ x.mT
        return super().forward(x + 0.0 * pairs_BTT.mean(-1, keepdim=True), state, is_init)


def test_what_is_not_linear_shows() -> None:
    make = {"mlp": MLP, "quadratic": Quadratic}
    # An activation that has one way for few and for many steps.
    trunks = {name: trunk(trunk_speed.D_MODEL, activation="gelu") for name, trunk in make.items()}
    linear, quadratic = trunk_speed.measure(trunks, steps=32, long=1024, rounds=1)
    assert linear["linear memory"] == pytest.approx(1, abs=0.1)
    assert quadratic["linear memory"] > 2


class FromTwoLayers(GRU):
    def __init__(self, in_features: int, *, d_model: int = 8, n_layers: int = 2) -> None:
        if n_layers < 2:
            raise ValueError("n_layers must be at least 2")
        super().__init__(in_features, d_model=d_model, n_layers=n_layers)


def test_a_trunk_that_cannot_have_one_layer_keeps_its_own(capsys: pytest.CaptureFixture) -> None:
    trunk = trunk_speed.one_layer(Contender("deep", FromTwoLayers))
    assert trunk.rnn.num_layers == 2
    assert "deep keeps its own number of layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grru"], "unknown trunk 'grru'; did you mean gru"),
        (["gru", "--csv", "nowhere/t.csv"], "no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert trunk_speed.main(arguments) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------ gpu_check


NO_MORE = """
import sys
from lit_rl.benchmarks import gpu_check
code = gpu_check.main([])
loaded = {"torchrl", "gymnasium", "lightning", "jsonargparse"} & set(sys.modules)
assert not loaded, loaded
sys.exit(code)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_cuda_it_says_so_and_needs_little() -> None:
    done = subprocess.run([sys.executable, "-c", NO_MORE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "no CUDA device here: nothing was checked\n"), done.stderr


class Choice(MLP):
    """A trunk with backends, one of which is not for here."""

    def __init__(
        self, in_features: int, *, d_model: int = 8, backend: Literal["plain", "kernel"] = "plain"
    ) -> None:
        if backend == "kernel":
            raise ImportError("no module named kernels")
        super().__init__(in_features, d_model=d_model)


class Faulty(MLP):
    """Rows see each other."""

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        return super().forward(x + x.mean(0), state, is_init)


class Refuses(MLP):
    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        raise RuntimeError("not on this device")


def test_table_of_checks_and_costs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """On the CPU in place of a GPU."""
    trunks = [Contender(one.__name__.lower(), one) for one in (LSTM, Choice, Faulty, Refuses)]
    monkeypatch.setattr(gpu_check, "ROWS", (2,))
    rows = gpu_check.check(trunks, "cpu", rounds=1)
    lstm, choice, kernel, faulty, refuses = rows
    assert [row["trunk"] for row in rows[:2]] == ["lstm", "choice backend=plain"]
    assert kernel["trunk"] == "choice backend=kernel"
    assert kernel["checks"].startswith("not checked: UserError")
    assert "no module named kernels" in kernel["checks"]
    assert list(kernel.values())[2:] == ["-"] * 4
    assert list(refuses.values()) == ["refuses", "0 passed, 1 failed", "-", "-", "-", "-"]
    assert list(lstm) == ["trunk", "checks", "B=2 ms", "B=2 / lstm", "B=2 MiB", "B=2 MiB / lstm"]
    assert lstm["B=2 / lstm"] == lstm["B=2 MiB / lstm"] == 1
    assert lstm["checks"] == choice["checks"] == f"{len(CHECKS)} passed, 0 failed"
    assert faulty["trunk"] == "faulty"
    assert not faulty["checks"].endswith(" 0 failed")
    assert gpu_check.summary(rows) == ("2 right, 2 failed, 1 not checked", 1)
    assert gpu_check.summary([lstm, choice, kernel]) == ("2 right, 0 failed, 1 not checked", 0)
    printed = capsys.readouterr().out
    assert "choice backend=kernel does not run here: UserError" in printed
    assert "no module named kernels" in printed
    assert "faulty: no leak between rows: " in printed


class Large(MLP):
    """Does not fit where more than two rows come."""

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x, state, is_init)


@pytest.mark.parametrize(("large", "measured"), [("large", {"lstm"}), ("lstm", {"large"})])
def test_costs_go_on_where_one_is_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, large: str, measured: set[str]
) -> None:
    """Also where it is the peer."""
    monkeypatch.setattr(gpu_check, "ROWS", (2, 3))
    names = ["large", "lstm"]
    trunks = [Contender(name, Large if name == large else MLP) for name in names]
    found = gpu_check.costs(trunks, [*names, "absent"], "cpu", rounds=1)
    assert all(isinstance(found[name]["B=2 / lstm"], float) for name in names)
    assert {name for name in found if found[name]["B=3 ms"] != "-"} == measured
    assert (found[large]["B=3 / lstm"], found["absent"]["B=2 MiB"]) == ("-", "-")
    assert f"{large}: no costs with B=3: OutOfMemoryError: out of memory" in capsys.readouterr().out


def test_costs_are_measured_in_full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []

    class Watched(MLP):
        def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
            allowed.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().forward(x, state, is_init)

    monkeypatch.setattr(gpu_check, "ROWS", (2,))
    gpu_check.costs([Contender("watched", Watched)], ["watched"], "cpu", rounds=1)
    assert set(allowed) == {(False, False)}
