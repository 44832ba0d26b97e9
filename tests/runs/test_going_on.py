"""Runs that are stopped and go on: by the command, with `--ckpt_path last`."""

import errno
import fcntl
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import CARTPOLE, Done, listing, run, shown_at
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rl import checkpoints

ROLLOUT, EPOCH, TOTAL = 32, 96, 256  # frames; the last epoch is short of a rollout
OPTIONS = (
    "fit",
    "--config",
    CARTPOLE,
    "--name=it",
    "--env.num_envs=2",
    "--data.rollout_length=16",
    f"--data.frames_per_epoch={EPOCH}",
    f"--model.total_frames={TOTAL}",
    "--model.num_minibatches=2",
    "--model.normalize_observation=true",
    "--model.normalize_reward=true",
    "--episodes=2",
    "--trainer.accelerator=cpu",
)
FOLDER = Path("logs/it/version_0")
LAST = FOLDER / "checkpoints" / "last.ckpt"
# Where the signal comes, and the frames that are then learnt from.
MOMENTS = {
    "while learning": ("on_train_batch_start", 128, 160),
    "in an epoch's last rollout": ("on_train_batch_start", 64, 96),
    "in the first rollout": ("on_train_batch_start", 0, 32),
    "while evaluating": ("on_validation_batch_end", 96, 96),
    "at an epoch's end": ("on_train_epoch_end", 192, 192),
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(*options: str) -> Done:
    return run(*OPTIONS, *options)


def stopped(moment: str, name: str = "SIGTERM", *options: str) -> Done:
    hook, frames, _ = MOMENTS[moment]
    init_args = f"{{name: {name}, hook: {hook}, frames: {frames}}}"
    return fit(f"--trainer.callbacks=[{{class_path: probes.SignalAt, init_args: {init_args}}}]", *options)


def go_on(*options: str) -> Done:
    done = fit("--ckpt_path=last", *options)
    assert done.code == 0, done.err
    return done


def last() -> dict[str, Any]:
    return dict(checkpoints.load(LAST))


def steps(tag: str) -> list[int]:
    return shown_at(FOLDER, tag)


def tensors(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights, statistics and Adam's moments, flat."""
    states = checkpoint["optimizer_states"][0]["state"]
    moments = {f"{i} {key}": value for i, state in states.items() for key, value in state.items()}
    return dict(checkpoint["state_dict"]) | moments


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far the tensors that are not equal to the bit lie apart."""
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    return {
        key: float((mine[key] - theirs[key]).abs().max())
        for key in mine
        if not torch.equal(mine[key], theirs[key])
    }


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_and_gone_on(moment: str) -> None:
    """Nothing is lost but the simulators' episodes, nothing is trained twice, and it is one run."""
    learnt = MOMENTS[moment][2]
    done = stopped(moment)
    assert done.code == 128 + signal.SIGTERM
    assert done.out.endswith("stopped by SIGTERM; --ckpt_path last goes on\n")
    assert done.err == ""
    left = last()
    assert left["frames"] == learnt
    assert left["RolloutDataModule"]["collectors"][0]["frames"] == learnt
    assert steps("train/lr") == list(range(ROLLOUT, learnt + 1, ROLLOUT))

    done = go_on()
    assert done.out.startswith(f"from {LAST}\n")
    assert [path.name for path in Path("logs/it").iterdir()] == ["version_0"]
    assert {path.name for path in LAST.parent.iterdir()} == {"best.ckpt", "last.ckpt", "run.lock"}
    assert last()["frames"] == last()["RolloutDataModule"]["collectors"][0]["frames"] == TOTAL
    assert steps("train/lr") == list(range(ROLLOUT, TOTAL + 1, ROLLOUT))
    evaluated = steps("val/return")
    assert evaluated == sorted(set(evaluated))
    assert evaluated[-1] == TOTAL
    assert last()["global_step"] == (TOTAL // ROLLOUT) * 4 * 2  # epochs, minibatches
    assert (FOLDER / "learning_curve.png").exists()


def test_what_is_left_is_the_run_up_to_there() -> None:
    """A run that is stopped at 160 frames leaves what one of 160 frames ends with, to the bit."""
    assert stopped("while learning", "SIGTERM", "--model.anneal_lr=false").code == 143
    left = last()
    shutil.rmtree("logs")
    assert fit("--model.anneal_lr=false", "--model.total_frames=160").code == 0
    assert not differences(left, last())
    # Negative control: one rollout more is not the same.
    shutil.rmtree("logs")
    assert fit("--model.anneal_lr=false", "--model.total_frames=192").code == 0
    assert differences(left, last())


def test_going_on_twice_is_the_same() -> None:
    stopped("while learning")
    shutil.copytree("logs", "copy")
    go_on()
    first = last()
    shutil.rmtree("logs")
    shutil.move("copy", "logs")
    go_on()
    assert not differences(first, last())
    for kind in ("python", "numpy", "torch"):
        assert str(first["random_state"][0][kind]) == str(last()["random_state"][0][kind])
    assert first["optimizer_states"][0]["param_groups"] == last()["optimizer_states"][0]["param_groups"]


def test_ctrl_c_is_a_signal_like_another() -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it from the start
    done = stopped("while learning", "SIGINT")
    assert done.code == 128 + signal.SIGINT
    assert done.out.endswith("stopped by SIGINT; --ckpt_path last goes on\n")
    assert last()["frames"] == 160
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_has_nothing_to_do() -> None:
    assert fit().code == 0
    before = last()
    done = go_on()
    assert f"\nall {TOTAL} frames are trained: raise --model.total_frames to go on\n" in done.out
    assert not differences(before, last())
    assert last()["frames"] == TOTAL
    assert steps("train/lr")[-1] == TOTAL
    # With a larger budget it has.
    go_on(f"--model.total_frames={TOTAL + 4 * ROLLOUT}")
    assert last()["frames"] == TOTAL + 4 * ROLLOUT
    assert steps("train/lr") == list(range(ROLLOUT, TOTAL + 4 * ROLLOUT + 1, ROLLOUT))


def test_what_a_killed_run_wrote_after_its_checkpoint_is_replaced() -> None:
    """A kill between two checkpoints: the frames in between are trained, and drawn, once more."""
    stopped("while evaluating")  # a checkpoint at 96 frames
    early = LAST.read_bytes()
    go_on()
    LAST.write_bytes(early)
    go_on()
    assert last()["frames"] == TOTAL
    assert steps("train/lr") == list(range(ROLLOUT, TOTAL + 1, ROLLOUT))
    evaluated = steps("val/return")
    assert evaluated == sorted(set(evaluated))


def test_the_best_stays_the_best() -> None:
    """The score to beat survives; where nothing beats it the file does, too."""
    assert stopped("at an epoch's end").code == 143

    def score(checkpoint: dict[str, Any]) -> float:
        [state] = (s for s in checkpoint["callbacks"].values() if s.get("monitor") == "val/return")
        return float(state["best_model_score"])

    contents = dict(checkpoints.load(LAST))
    for state in contents["callbacks"].values():
        if state.get("monitor") == "val/return":
            state["best_model_score"] = torch.tensor(1e6)
            state["best_k_models"] = dict.fromkeys(state["best_k_models"], torch.tensor(1e6))
    torch.save(contents, LAST)
    best = LAST.with_name("best.ckpt").read_bytes()
    go_on()
    assert score(last()) == 1e6
    assert LAST.with_name("best.ckpt").read_bytes() == best


def test_a_damaged_last_falls_back_on_best() -> None:
    stopped("while learning")  # best: at 96 frames, the first evaluation; last: at 160
    LAST.write_bytes(LAST.read_bytes()[:-100])
    done = go_on()
    best = LAST.with_name("best.ckpt")
    assert done.out.startswith(f"from {best} (last.ckpt is missing or damaged)\n")
    assert last()["frames"] == TOTAL
    assert steps("train/lr") == list(range(ROLLOUT, TOTAL + 1, ROLLOUT))


def test_only_one_process_trains_in_a_folder() -> None:
    stopped("while learning")
    with FileLock(LAST.with_name("run.lock")):
        before, shown = listing(FOLDER), steps("train/lr")
        done = fit("--ckpt_path=last")
        assert done.code == 2
        [line] = done.err.splitlines()
        assert line.startswith("lit-rl: error: another process is training with the checkpoints in ")
        assert "it/version_0/checkpoints: wait for it, stop it, or start anew without --ckpt_path" in line
        after = listing(FOLDER)
        assert {name: after[name] for name in before} == before  # Lightning adds an empty file of events
        assert steps("train/lr") == shown
        assert fit().code == 0  # a folder of its own
    go_on()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_only_a_file_system_without_locks_goes_without(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = fit(f"--model.total_frames={ROLLOUT}")
    if number == errno.EIO:
        assert done.code == 2
        assert done.err == f"lit-rl: error: [Errno {number}] {os.strerror(number)} (OSError)\n"
        assert not LAST.exists()
    else:
        assert done.code == 0, done.err
        assert LAST.exists()


def test_another_name_is_another_run() -> None:
    stopped("while learning")
    before = LAST.read_bytes()
    for expected in ("version_0", "version_1"):
        assert fit(f"--ckpt_path={LAST}", "--name=other").code == 0
        assert checkpoints.load(Path("logs/other", expected, "checkpoints/last.ckpt"))["frames"] == TOTAL
    assert LAST.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_nothing_that_was_saved() -> None:
    stopped("while learning")
    before = LAST.read_bytes()
    partials = [LAST.with_name(f"{name}.partial") for name in ("last", "best")]
    for partial in partials:  # whichever is written first
        partial.symlink_to("/dev/full")
    done = fit("--ckpt_path=last")
    assert done.code == 2
    [line] = done.err.splitlines()
    assert "cannot write" in line
    assert ".ckpt (No space left on device)" in line
    assert LAST.read_bytes() == before
    for partial in partials:
        partial.unlink(missing_ok=True)
    go_on()
    assert last()["frames"] == TOTAL


@pytest.mark.parametrize("trunk", ["mlp", "gru"])
def test_bf16_mixed_goes_on(trunk: str) -> None:
    options = ("--trainer.precision=bf16-mixed", f"--model.trunk={trunk}")
    assert stopped("while learning", "SIGTERM", *options).code == 143
    shutil.copytree("logs", "copy")
    go_on(*options)
    first = last()
    assert {value.dtype for key, value in first["state_dict"].items() if "norm" not in key} <= {
        torch.float32,
        torch.float64,
    }
    events = EventAccumulator(str(FOLDER)).Reload()
    deviations = [event.value for event in events.Scalars("train/first_ratio_deviation")]
    assert len(deviations) == TOTAL // ROLLOUT
    assert max(deviations) < 1e-5  # acting and learning round alike; heads are float32
    shutil.rmtree("logs")
    shutil.move("copy", "logs")
    go_on(*options)
    assert not differences(first, last())
    if trunk != "mlp":
        return
    # Negative control: without the option it is another run, so bf16 was indeed at work.
    shutil.rmtree("logs")
    assert stopped("while learning", "SIGTERM", f"--model.trunk={trunk}").code == 143
    go_on(f"--model.trunk={trunk}")
    assert differences(first, last())
