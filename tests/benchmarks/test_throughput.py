"""Throughput: what is measured, how it is summed up, and that every measure runs."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lit_rl import registry
from lit_rl.benchmarks.throughput import ceilings, clock, command, ours, report
from lit_rl.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "throughput"
CARTPOLE = CONFIGS / "ppo_cartpole_mlp.yaml"


def test_the_clock_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 107.0, 108.0, 111.0])  # after each batch
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    measured = clock.Clock(seconds=3.5)
    for frames, over in ((1000, False), (1000, False), (60, False), (140, True)):
        measured.batch(frames)
        assert measured.is_over == over
    assert (measured.frames, measured.elapsed) == (200, 4.0)
    assert measured.speed == 50.0


def turn(number: int, speed: float, bare: float, peer: float | None = None) -> report.Turn:
    mine = dict.fromkeys(report.SHARES, 0.2) | {"steps/s": speed, "collecting steps/s": 5 * speed}
    measured = {
        "lit_rl": mine | {"first step": 2.5},
        "environment": {"steps/s": 9000.0},
        "bare loop": {"steps/s": bare, "collecting steps/s": 2 * bare},
    }
    return report.Turn("x", number, measured | ({} if peer is None else {"peer": {"steps/s": peer}}))


def test_ratios_are_of_turns_and_not_of_medians() -> None:
    turns = [turn(1, 100.0, 50.0, 25.0), turn(2, 300.0, 100.0, 100.0), turn(3, 200.0, 200.0, 50.0)]
    row = report.table(turns, "peer").splitlines()[-1].strip("| ").split(" | ")
    assert row[:2] == ["x", "200"]
    assert row[2:7] == ["20.0%"] * 5
    assert row[7:9] == ["2.5", "9,000"]
    assert row[9:13] == ["100", "2.00 (1.00 to 3.00)", "1,000", "5.00 (2.50 to 7.50)"]
    assert row[13:] == ["50", "4.00 (3.00 to 4.00)"]


def test_what_there_is_not_is_a_dash() -> None:
    assert report.table([turn(1, 100.0, 50.0)], "peer").splitlines()[-1].endswith("| - | - |")


def test_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--peer", "sb3", "--pairs", "1", "--seconds", "0.2", "--out", str(tmp_path / "out")]
    assert command.main(["throughput", str(CARTPOLE), *options]) == 0
    printed = capsys.readouterr().out
    assert "stable-baselines3" in printed
    assert (tmp_path / "out" / "table.md").read_text() in printed
    kept = json.loads((tmp_path / "out" / "turns.json").read_text())
    assert [row["measure"] for row in kept["turns"]] == [*command.MEASURES]
    assert all(row["steps/s"] > 0 for row in kept["turns"])
    mine = kept["turns"][0]
    assert sum(mine[share] for share in report.SHARES) == pytest.approx(1.0)
    assert min(mine[share] for share in report.SHARES) >= 0
    assert mine["first step"] > 0
    assert len((tmp_path / "out" / "turns.csv").read_text().splitlines()) == 5
    assert (tmp_path / "out" / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_ceilings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--no_ceilings", "--pairs", "1", "--seconds", "0.1"]
    assert command.main(["throughput", str(CARTPOLE), *options]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert [cell == "-" for cell in cells[-5:]] == [True, True, True, False, True]  # collecting is its own


def run_of(tmp_path: Path, config: str, **sections: dict) -> ours.cli.LitRLCLI:
    """A configuration with small sizes."""
    content = yaml.safe_load((CONFIGS / config).read_text())
    for name, changes in sections.items():
        content[name] = content[name] | changes if name == "env" else content[name]
        if name != "env":
            content[name]["init_args"] |= changes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return ours.build(tmp_path / "config.yaml", 1)


SMALL = {"data": {"rollout_length": 16}}
LOOPS = {
    "mlp": ("ppo_cartpole_mlp.yaml", SMALL),
    "lstm": ("ppo_cartpole_masked_lstm.yaml", SMALL),
    "continuous": ("ppo_cartpole_mlp.yaml", SMALL | {"env": {"id": "Pendulum-v1"}}),
    "dqn": ("dqn_cartpole_mlp.yaml", {"model": {"updates_per_block": 4, "learning_starts": 64}}),
}


@pytest.mark.parametrize(("config", "changes"), LOOPS.values(), ids=LOOPS)
def test_the_bare_loop_learns(tmp_path: Path, config: str, changes: dict) -> None:
    run = run_of(tmp_path, config, **changes)
    before = [parameter.clone() for parameter in run.model.agent.parameters()]
    found = ceilings.bare_loop(run, 0.05)
    assert found["collecting steps/s"] > found["steps/s"] > 0
    pairs = zip(before, run.model.agent.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)


def test_peers_of_every_kind(tmp_path: Path) -> None:
    from lit_rl.benchmarks.throughput import peers

    for config, changes in LOOPS.values():
        assert peers.stable_baselines3(run_of(tmp_path, config, **changes), 0.05)["steps/s"] > 0


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("ppo_cartpole_mlp.yaml", {"model": {"trunk": "gru"}}, "no learner of this kind on GRU"),
        ("ppo_cartpole_mlp.yaml", {"model": {"value_trunk": "shared"}}, "separate MLPs"),
        ("ppo_cartpole_mlp.yaml", {"env": {"frame_stack": 2}}, "no such form of CartPole-v1"),
        ("dqn_cartpole_mlp.yaml", {"model": {"double": True}}, "double: false"),
        ("dqn_cartpole_mlp.yaml", {"data": {"priority_exponent": 0.6}}, "no prioritized replay"),
    ],
)
def test_what_has_no_peer(tmp_path: Path, config: str, changes: dict, message: str) -> None:
    from lit_rl.benchmarks.throughput import peers

    with pytest.raises(UserError, match=message):
        peers.stable_baselines3(run_of(tmp_path, config, **changes), 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["throughput"], "CONFIG"),
        (["throughput", "nowhere.yaml"], "no configuration nowhere.yaml"),
        (["throughput", str(CARTPOLE), "--pairs", "0"], "above 0"),
        (["throughput", str(CARTPOLE), "--out", str(CARTPOLE)], "is a file, not a folder"),
        (["throughput", str(CARTPOLE), "--peer", "cleanrl"], "invalid choice"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main(arguments)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_fit(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    trunk = content["model"]["init_args"]["trunk"]
    name = trunk if isinstance(trunk, str) else trunk["class_path"]
    if name not in {entry.name for entry in registry.entries()}:
        pytest.skip(f"trunk {name} is not installed")
    ours.build(path, 1)
