"""Processes that are told to stop, and processes that are killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_helpers import CARTPOLE, run

from lit_rl import checkpoints

HERE = Path(__file__).parent
ROLLOUT = 8
OPTIONS = [
    "fit",
    "--config",
    str(CARTPOLE),
    "--name=it",
    "--env.num_envs=2",
    "--data.rollout_length=4",
    "--model.num_minibatches=2",
    "--model.total_frames=1000000",
    "--episodes=1",
    "--trainer.accelerator=cpu",
    "--ckpt_path=last",
]
LAST = Path("logs/it/version_0/checkpoints/last.ckpt")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_sigterm_from_outside() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_rl", *OPTIONS, "--data.frames_per_epoch=800"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not LAST.exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143
    assert out.endswith("stopped by SIGTERM; --ckpt_path last goes on\n")
    assert err.strip() == "stopping after this rollout"
    frames = checkpoints.load(LAST)["frames"]
    assert frames >= 800
    assert frames % ROLLOUT == 0
    total = frames + 3 * ROLLOUT
    done = run(*OPTIONS, "--data.frames_per_epoch=800", f"--model.total_frames={total}")
    assert done.code == 0, done.err
    assert checkpoints.load(LAST)["frames"] == total


def test_killed_again_and_again() -> None:
    """A checkpoint after every rollout, so that kills fall into the writing; each run goes on."""
    often = [*OPTIONS, f"--data.frames_per_epoch={ROLLOUT}"]
    kills = subprocess.run(
        [sys.executable, HERE / "kill_and_go_on.py", "6", "1", *often],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert kills.returncode == 0, kills.stderr
    left = [json.loads(line) for line in kills.stdout.splitlines()]
    assert len(left) == 6
    assert all(moment["whole"] for moment in left)
    frames = [moment["frames"] for moment in left]
    assert frames == sorted(frames)
    assert len(set(frames)) == 6  # every run went on from the one before
    total = frames[-1] + 2 * ROLLOUT
    done = run(*often, f"--model.total_frames={total}")
    assert done.code == 0, done.err
    assert f"from {LAST}" in done.out
    finished = checkpoints.load(LAST)
    assert finished["frames"] == total
    assert all(torch.isfinite(value).all() for value in finished["state_dict"].values())
    assert not list(LAST.parent.glob("*.partial"))
