"""Runs as a table, a picture and numbers."""

import csv
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_rl.benchmarks import curves


def fake_run(folder: Path, seed: int, final: float) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")
    with SummaryWriter(str(folder)) as writer:
        for step in range(0, 1001, 10):
            writer.add_scalar("episode/success", float(step > 900), step)
        writer.add_scalar("val/success", 0.1, 500)
        writer.add_scalar("val/success", final, 1000)


def test_seeds_of_two_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fake_run(tmp_path / "one" / "version_1", 2, 1.0)
    fake_run(tmp_path / "one" / "version_0", 1, 0.5)
    fake_run(tmp_path / "two" / "version_0", 1, 0.25)
    folders = [str(tmp_path / name) for name in ("one", "two")]
    arguments = [*folders, "--metric", "success", "--out", str(tmp_path / "out")]
    assert curves.main(arguments) == 0
    # Training succeeds in its last tenth alone.
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| one | 1 | 0.50 | 1.00 | 0.10 |",
        "| one | 2 | 1.00 | 1.00 | 0.10 |",
        "| one | mean, IQM, interval | 0.75, 0.75, 0.50 to 1.00 | 1.00, 1.00, 1.00 to 1.00 "
        "| 0.10, 0.10, 0.10 to 0.10 |",
        "| two | 1 | 0.25 | 1.00 | 0.10 |",
    ]
    kept = list(csv.DictReader((tmp_path / "out" / "curve.csv").read_text().splitlines()))
    assert [row["success"] for row in kept if row["curve"] == "evaluation"] == [
        "0.1", "0.5", "0.1", "1.0", "0.1", "0.25",
    ]  # fmt: skip
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert curves.main([*arguments, "--digits", "1"]) == 0
    assert "| one | mean, IQM, interval | 0.8, 0.8, 0.5 to 1.0 |" in capsys.readouterr().out


def test_td_losses_are_a_column_where_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fake_run(tmp_path / "dqn" / "version_0", 1, 0.5)
    with SummaryWriter(str(tmp_path / "dqn" / "version_0")) as writer:
        for step, loss in ((500, 3.0), (950, 0.25), (1000, 0.75)):
            writer.add_scalar("train/td_loss", loss, step)
    assert curves.main([str(tmp_path / "dqn"), "--metric", "success", "--out", str(tmp_path / "out")]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.endswith("| TD loss, last tenth |")
    assert row == "| dqn | 1 | 0.50 | 1.00 | 0.10 | 0.5 |"


def test_mean_is_of_the_frames_that_all_seeds_share() -> None:
    one = curves.Run("one", 1, [(10, 1.0), (20, 3.0), (30, 9.0)], [], [])
    two = curves.Run("one", 2, [(10, 2.0), (20, 6.0), (31, 8.0)], [], [])
    assert curves.mean_evaluation([one, two]) == [(10, 1.5), (20, 4.5)]


def test_sums_by_hand() -> None:
    assert curves.interquartile_mean([9.0, 1.0, 2.0, 3.0, 100.0]) == pytest.approx((2 + 3 + 9) / 3)
    assert curves.interquartile_mean([1.0, 3.0]) == 2.0
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    low, high = curves.bootstrap_interval(values)
    normal = 1.96 * values.std() / len(values) ** 0.5
    assert (low, high) == pytest.approx((values.mean() - normal, values.mean() + normal), abs=0.02)


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fake_run(tmp_path / "one" / "version_0", 1, 0.5)
    for name in ("0", "1"):
        fake_run(tmp_path / "again" / f"version_{name}", 4, 0.5)
    success = ["--metric", "success"]
    for arguments in (
        [str(tmp_path / "one")],
        [str(tmp_path), *success],
        [str(tmp_path / "again"), *success],
    ):
        assert curves.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "no val/return and episode/return" in lines[0]
    assert "holds no runs" in lines[1]
    assert "again has seed 4 twice" in lines[2]
    assert not (tmp_path / "out").exists()
