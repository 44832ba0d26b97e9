"""Rollouts of two processes, by TorchRL's multi-process and Ray collectors: what comes, goes on and ends."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import CARTPOLE
from helpers import small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rl import checkpoints
from lit_rl.collectors import RolloutCollector
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.workers import RolloutWorker, Workers

LAUNCHERS = ("processes", "ray")
ENV = EnvConfig("CartPole-v1", num_envs=4)
RUN = Path("logs/it/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"
FIT = (
    *(sys.executable, "-m", "lit_rl", "fit"),
    f"--config={CARTPOLE}",
    "--name=it",
    "--env.num_envs=4",
    "--data.rollout_length=16",
    "--data.frames_per_epoch=64",
    "--data.num_workers=2",
    "--model.num_minibatches=1",
    "--model.trunk=gru",
    "--episodes=1",
)


def fit(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [*FIT, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_rollouts_are_those_of_collectors_in_one_process(launcher: str) -> None:
    """With the newest weights and statistics, rollout after rollout; no two environments share a seed."""
    script = Path(__file__).parent / "fixtures" / "workers.py"
    done = subprocess.run(
        [sys.executable, script, launcher], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("done")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_with_workers_goes_on(tmp_path: Path, launcher: str) -> None:
    which = f"--data.launcher={launcher}"
    done = fit(tmp_path, which, "--model.total_frames=128")
    assert done.returncode == 0, done.stderr
    done = fit(tmp_path, which, "--model.total_frames=256", "--ckpt_path=last")
    assert done.returncode == 0, done.stderr
    assert checkpoints.load(tmp_path / LAST)["frames"] == 256
    events = EventAccumulator(str(tmp_path / RUN), size_guidance={"scalars": 0}).Reload()
    deviations = events.Scalars("train/first_ratio_deviation")
    assert [event.step for event in deviations] == [64, 128, 192, 256]
    assert max(event.value for event in deviations) < 1e-5


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(("after", "frames"), [(20, 64), (-1, None)])
def test_what_fails_in_a_worker_is_told_in_one_line(
    tmp_path: Path, after: int, frames: int | None, launcher: str
) -> None:
    """While it collects, and while it is built."""
    env = ("--env.id=lit_rl/NaN-v0", f"--env.kwargs={{after: {after}}}")
    done = fit(tmp_path, *env, f"--data.launcher={launcher}", "--trainer.limit_val_batches=0")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"observation of environment 0 of lit_rl/NaN-v0 is not finite at step {after + 1}" in line
    assert line.endswith("mend the environment or bound what it returns")
    last = tmp_path / LAST
    assert (checkpoints.load(last)["frames"] if last.exists() else None) == frames


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_ends_all(tmp_path: Path, launcher: str) -> None:
    options = ("--model.total_frames=1000000", f"--data.launcher={launcher}")
    process = subprocess.Popen(
        [*FIT, *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / LAST).exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)  # ends when all have ended who share the pipes
    assert process.returncode == 143, err
    assert out.endswith("stopped by SIGTERM; --ckpt_path last goes on\n")
    assert err.strip() == "stopping after this rollout"


def test_a_state_is_that_of_a_collector() -> None:
    """So that a run goes on with another number of workers, and without any."""
    agent = ActorCritic(*ENV.spaces(), small("gru"))
    workers = Workers(ENV, agent, num_workers=2, rollout_length=8, seed=5)
    collector = RolloutCollector(ENV.make, agent, frames_per_batch=32, seed=5)
    collector.rollout()
    workers.load_state_dict(collector.state_dict())
    state = workers.state_dict()
    assert state.keys() == collector.state_dict().keys()
    assert state["frames"] == 32
    collector.load_state_dict(state)
    assert collector.state_dict()["frames"] == 32
    workers.shutdown()  # which has not begun


@pytest.mark.parametrize(
    "option", [{"replay_buffer": object()}, {"max_frames_per_traj": 10}, {"reset_when_done": False}]
)
def test_workers_refuse_what_they_cannot_honour(option: dict[str, Any]) -> None:
    def agent() -> ActorCritic:
        return ActorCritic(*ENV.spaces(), small("gru"))

    make = partial(RolloutWorker, ENV.make, policy_factory=agent, frames_per_batch=32, traj_pool=object())
    assert make(reset_when_done=True, max_frames_per_traj=0, replay_buffer=None).num_steps == 8
    with pytest.raises(UserError, match=f"cannot honour {next(iter(option))}"):
        make(**option)


def test_environments_are_divided_among_workers() -> None:
    with pytest.raises(UserError, match="launcher is 'rey': choose processes or ray"):
        RolloutDataModule(ENV, num_workers=2, launcher="rey")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="4 environments do not divide among 3 workers"):
        RolloutDataModule(ENV, num_workers=3)


def test_a_launcher_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'lit-rl\[ray\]'"):
        RolloutDataModule(ENV, num_workers=2, launcher="ray")


def test_mixed_precision_travels() -> None:
    from lit_rl.data.rollout import WORKER_CONTEXTS

    with WORKER_CONTEXTS["bf16-mixed"]():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
