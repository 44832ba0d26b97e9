"""Two processes on the CPU train one agent."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import probes
import pytest
import torch
from cli_helpers import CARTPOLE
from helpers import make_trainer
from processes import DDP, LIT_RL, distance, found, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensordict import TensorDict

from lit_rl import checkpoints
from lit_rl.algorithms import LitPPO
from lit_rl.data.rollout import RolloutDataModule, RolloutLoader
from lit_rl.envs import EnvConfig
from lit_rl.trunks import GRU

FRAMES = 2 * 2 * 16  # a rollout: processes, environments, steps
LEARNING = {
    "total_frames": 4 * FRAMES,
    "num_epochs": 6,
    "num_minibatches": 1,
    "lr": 0.03,
    "target_kl": 0.002,
    "normalize_observation": True,
    "normalize_reward": True,
}
OPTIONS = [
    "fit",
    "--config",
    str(CARTPOLE),
    "--name=it",
    "--env.num_envs=2",
    "--data.rollout_length=16",
    f"--data.frames_per_epoch={2 * FRAMES}",
    "--episodes=3",
    "--model.trunk=gru",
    "--model.trunk.d_model=8",
    "--model.value_trunk=shared",
    *(f"--model.{key}={value}".replace("True", "true") for key, value in LEARNING.items()),
]
LAST = Path("logs/it/version_0/checkpoints/last.ckpt")


def probe(folder: str) -> str:
    return f"--trainer.callbacks=[{{class_path: probes.Probe, init_args: {{folder: {folder}}}}}]"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Run:
    """A finished run of two processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done = launch(folder, [*LIT_RL, *OPTIONS, *DDP, probe("first")])
        assert self.done.returncode == 0, self.done.stderr
        self.checkpoint = dict(checkpoints.load(folder / LAST))
        self.ranks = found(folder / "first")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("ddp"))


def test_weights_agree_after_every_update(run: Run) -> None:
    for rank in run.ranks:
        assert rank["equal"] == [True] * 4
        assert rank["frames"] == [n * FRAMES for n in (1, 2, 3, 4)]
    one, other = run.ranks
    assert probes.same(one["end"], other["end"])
    assert not probes.same(one["start"], one["end"])


def test_data_differ(run: Run) -> None:
    one, other = (rank["rollouts"] for rank in run.ranks)
    for mine, theirs in zip(one, other, strict=True):
        assert not torch.equal(mine["steps", "observation"], theirs["steps", "observation"])
        assert not torch.equal(mine["steps", "action"], theirs["steps", "action"])
    rows = torch.cat([part[0]["steps", "observation"][:, 0] for part in (one, other)])
    assert len(rows.unique(dim=0)) == 4  # no environment starts like another


class Given(RolloutDataModule):
    """One rollout, made elsewhere."""

    def __init__(self, rollout: TensorDict) -> None:
        super().__init__(EnvConfig("CartPole-v1", num_envs=len(rollout)), rollout_length=16)
        self.rollout = rollout

    def train_dataloader(self) -> Any:
        return RolloutLoader(SimpleNamespace(rollout=lambda: self.rollout), 1)  # type: ignore[arg-type]


def learn_alone(start: dict[str, torch.Tensor], rollout: TensorDict) -> dict[str, torch.Tensor]:
    """The state after one process has learnt from a rollout."""
    data = Given(rollout)
    model = LitPPO(data.env, lambda features: GRU(features, d_model=8), **LEARNING)
    model.load_state_dict(start)
    make_trainer(max_epochs=1).fit(model, data)
    return model.state_dict()


def test_an_update_is_that_of_one_process_with_all_data(run: Run) -> None:
    """Gradients, advantages, KL and statistics are those of both halves together."""
    start, after = run.ranks[0]["start"], run.ranks[0]["after_first"]
    halves = [rank["rollouts"][0] for rank in run.ranks]
    together = learn_alone(start, torch.cat(halves))
    assert distance(together, after) < 1e-5
    # Negative control: one half of the data tells something else.
    assert distance(learn_alone(start, halves[0]), after) > 1e-2


def test_the_update_stops_early_on_both(run: Run) -> None:
    """target_kl was reached, or this would not test that the ranks agree about it."""
    steps = run.checkpoint["optimizer_states"][0]["state"][0]["step"]
    assert 4 <= steps < 4 * LEARNING["num_epochs"]


def test_statistics_are_those_of_all_data(run: Run) -> None:
    seen = torch.cat([part["steps", "observation"] for rank in run.ranks for part in rank["rollouts"]])
    seen = seen.flatten(0, 1).double()
    for rank in run.ranks:
        assert rank["end"]["agent.norms.0.count"] == len(seen) == 4 * FRAMES
        torch.testing.assert_close(rank["end"]["agent.norms.0.mean"], seen.mean(0))
        torch.testing.assert_close(rank["end"]["agent.norms.0.var"], seen.var(0, unbiased=False))
        assert rank["end"]["reward_scale.count"] == 4 * FRAMES
    # Negative control: neither half has these moments.
    half = torch.cat([part["steps", "observation"] for part in run.ranks[0]["rollouts"]]).flatten(0, 1)
    assert not torch.allclose(half.double().mean(0), seen.mean(0), rtol=1e-3)


def test_evaluation_is_shared(run: Run) -> None:
    assert [rank["episodes"] for rank in run.ranks] == [2 * 2, 2 * 1]  # evaluations, episodes
    one, other = (rank["metrics"] for rank in run.ranks)
    assert one == other
    assert one["val/return"] == one["val/length"]


def test_there_may_be_fewer_episodes_than_processes(tmp_path: Path) -> None:
    """A sanity check too, in which DDP would have all of them exchange buffers."""
    few = ["--episodes=1", "--trainer.num_sanity_val_steps=1"]
    done = launch(tmp_path, [*LIT_RL, *OPTIONS, *DDP, *few, probe("found")])
    assert done.returncode == 0, done.stderr
    assert [rank["episodes"] for rank in found(tmp_path / "found")] == [3 * 1, 0]  # evaluations, episodes
    assert done.stdout.count("(1 greedy episodes of CartPole-v1") == 1
    options = [f"--ckpt_path={LAST}", "--episodes=1", "--output=out", *DDP]
    done = launch(tmp_path, [*LIT_RL, "predict", *options])
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_one_process_speaks_and_writes(run: Run) -> None:
    lines = run.done.stdout.splitlines()
    assert sum(line.startswith("evaluation: ") for line in lines) == 1
    assert sum(line.startswith("checkpoint: ") for line in lines) == 1
    assert [path.name for path in (run.folder / "logs/it").iterdir()] == ["version_0"]
    events = EventAccumulator(str(run.folder / "logs/it/version_0")).Reload()
    assert [event.step for event in events.Scalars("train/lr")] == [n * FRAMES for n in (1, 2, 3, 4)]
    assert run.checkpoint["frames"] == 4 * FRAMES


def test_checkpoints_hold_the_state_of_every_rank(run: Run) -> None:
    collectors = run.checkpoint["RolloutDataModule"]["collectors"]
    assert [collector["frames"] for collector in collectors] == [2 * FRAMES, 2 * FRAMES]
    assert not torch.equal(collectors[0]["generator"], collectors[1]["generator"])
    assert len(run.checkpoint["random_state"]) == 2


def test_fabric_run_goes_on(run: Run) -> None:
    """`fabric run` starts two processes, and each finds what belongs to it."""
    # Random states that differ, to tell one rank's from another's.
    contents = dict(checkpoints.load(run.folder / LAST))
    first, second = contents["random_state"]
    contents["random_state"] = [first, second | {"numpy": ["MT19937", torch.arange(624), 7, 0, 0.0]}]
    torch.save(contents, run.folder / LAST)
    bin_folder = Path(sys.executable).parent
    command = [
        bin_folder / "fabric",
        "run",
        "--accelerator",
        "cpu",
        "--devices",
        "2",
        "--main-port",
        free_port(),
    ]
    options = [*OPTIONS, f"--model.total_frames={5 * FRAMES}", "--ckpt_path=last", probe("second")]
    done = launch(run.folder, [*command, bin_folder / "lit-rl", *options])
    assert done.returncode == 0, done.stderr
    assert f"from {LAST}" in done.stdout
    ranks = found(run.folder / "second")
    collectors = run.checkpoint["RolloutDataModule"]["collectors"]
    for rank, collector, random_state in zip(ranks, collectors, contents["random_state"], strict=True):
        assert probes.same(rank["start"], run.checkpoint["state_dict"])
        assert torch.equal(rank["generator"], collector["generator"])
        assert torch.equal(rank["random_state"]["torch"], random_state["torch"])
        assert torch.equal(rank["random_state"]["numpy"][1], random_state["numpy"][1].long())
        saved = run.checkpoint["optimizer_states"][0]["state"]
        for number, state in rank["optimizer"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(saved[number][key])), key
        assert rank["frames"] == [5 * FRAMES]
        assert rank["equal"] == [True]
    # New episodes, other than the first ones and other than each other's.
    starts = [part["rollouts"][0]["steps", "observation"][:, 0] for part in (*run.ranks, *ranks)]
    assert len(torch.cat(starts).unique(dim=0)) == 8
    assert np.isfinite(ranks[0]["metrics"]["val/return"])


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_in_one_ends_both(tmp_path: Path, culprit: int) -> None:
    """After a checkpoint, in the middle of a rollout; the other process is told and does not wait."""
    wrapper = f"[{{class_path: probes.FaultAt, init_args: {{rank: {culprit}, after: 40}}}}]"
    done = launch(tmp_path, [*LIT_RL, *OPTIONS, *DDP, f"--env.wrappers={wrapper}"])
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("lit-rl: error: CartPole-v1: environment 0 failed in step() after 40 steps")
    assert "this one is broken" in line
    assert checkpoints.load(tmp_path / LAST)["frames"] == 2 * FRAMES


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_first_ends_both(tmp_path: Path, number: signal.Signals) -> None:
    options = [*OPTIONS, *DDP, "--model.total_frames=1000000"]
    process = subprocess.Popen(
        [*LIT_RL, *options], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / LAST).exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)  # ends when both have ended, who share the pipes
    found = checkpoints.newest_whole(tmp_path / "logs")
    assert found is not None
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert out.count("stopped by SIGTERM; --ckpt_path last goes on") == 1
        assert err.strip() == "stopping after this rollout"
        collectors = checkpoints.load(found)["RolloutDataModule"]["collectors"]
        assert collectors[0]["frames"] == collectors[1]["frames"]
    else:
        assert process.returncode == -signal.SIGKILL
