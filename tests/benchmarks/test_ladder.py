"""The memory ladder, `lit-rl trunks check NAME --learn`: what it prints and keeps, and that it tells memory
from none."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_rl import trunk_commands
from lit_rl.benchmarks import ladder
from lit_rl.benchmarks.measure import Contender
from lit_rl.errors import UserError

torch.set_num_threads(1)

COLUMNS = [
    "trunk",
    "success k=8",
    "success k=32",
    "success k=128",
    "steps/s",
    "ms an action",
    "parameters",
    "state bytes",
]


def test_a_tiny_budget_prints_all_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ladder, "PEERS", ("mlp", "gru", "not_installed"))
    monkeypatch.setattr(ladder, "EPISODES", 4)
    arguments = ["gru", "--option", "d_model=8", "--learn", "--frames", "1", "--csv", "runs.csv"]
    assert trunk_commands.main(["check", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "chance 0.25" in lines[0]
    assert any(line.startswith("left out: unknown trunk 'not_installed'") for line in lines)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    assert header == COLUMNS
    assert [row[0] for row in rows] == ["gru d_model=8", "mlp", "gru"]
    assert [row[-1] for row in rows] == ["32", "0", "256"]  # float32, d_model numbers
    assert all(len(row) == len(COLUMNS) and all(row) for row in rows)
    kept = list(csv.DictReader(Path("runs.csv").read_text().splitlines()))
    assert [(row["trunk"], row["k"]) for row in kept] == [
        (row[0], k) for row in rows for k in ("8", "32", "128")
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_one_seed_one_result() -> None:
    rung = ladder.Rung(delay=1, frames=600, gamma=0.9)

    def success(seed: int) -> float:
        return ladder.climb(Contender.named("gru", d_model=4), rung, seed).success

    assert success(1) == success(1)


def test_a_run_without_a_mistake_ends_early() -> None:
    rung = ladder.Rung(delay=1, frames=200_000, gamma=0.9)
    climbed = ladder.climb(Contender.named("gru", d_model=16), rung, seed=1)
    assert climbed.success == 1.0
    assert climbed.frames < 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gru", "--frames", "5"], "--frames goes with --learn"),
        (["gru", "--learn", "--frames", "0"], "frames is 0: it must be at least 1"),
        (["gru", "--learn", "--frames", "many"], "argument --frames: invalid int value: 'many'"),
        (["gru", "--learn", "--seed", "-1"], "seed is -1"),
        (["gru", "--learn", "--csv", "nowhere/runs.csv"], "there is no folder nowhere"),
        (["gru", "--learn", "--option", "n_layers=0"], "cannot be built with {'n_layers': 0}"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        trunk_commands.main(["check", *arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_needs_no_torch() -> None:
    code = """
import sys
from lit_rl.trunk_commands import main
try:
    main(["check", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--learn" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("trunk", ["gru", "lstm"])
@pytest.mark.parametrize("rung", ladder.RUNGS[:2], ids=lambda rung: f"k={rung.delay}")
def test_memory_climbs(trunk: str, rung: ladder.Rung, seed: int) -> None:
    climbed = ladder.climb(Contender.named(trunk, d_model=ladder.D_MODEL), rung, seed)
    print(f"\n{climbed}")
    assert climbed.success >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("rung", ladder.RUNGS, ids=lambda rung: f"k={rung.delay}")
def test_an_mlp_stays_at_chance(rung: ladder.Rung, seed: int) -> None:
    climbed = ladder.climb(Contender.named("mlp", d_model=ladder.D_MODEL), rung, seed)
    print(f"\n{climbed}")
    # 0.40 is 3.5 standard deviations of 100 episodes above 0.25.
    assert climbed.success < 0.40
