"""DQN runs that are stopped and go on: the replay comes back with everything else."""

import shutil
from pathlib import Path
from typing import Any

import dqn_probes
import pytest
from cli_helpers import Done, run, shown_at
from processes import DDP, LIT_RL, launch

from lit_rl import checkpoints

EPOCH, STOPPED, TOTAL = 64, 160, 256  # frames; it is stopped in the middle of an epoch
OPTIONS = (
    "fit",
    "--name=it",
    "--env.id=CartPole-v1",
    "--env.num_envs=2",
    "--trainer.accelerator=cpu",
    "--episodes=2",
    "--model=LitDQN",
    f"--model.total_frames={TOTAL}",
    "--model.learning_starts=32",
    "--model.window=4",
    "--model.n_step=2",
    "--model.context=stored",
    "--model.batch_size=8",
    "--model.updates_per_block=2",
    "--model.target_update_frames=48",
    "--model.exploration_frames=300",
    "--model.trunk=lstm",
    "--model.trunk.d_model=8",
    "--model.latents=true",
    "--data=ReplayDataModule",
    "--data.steps_per_block=8",
    "--data.stride=2",
    "--data.buffer_size=100",  # 50 windows: full before the run is stopped
    "--data.priority_exponent=0.6",
    f"--data.frames_per_epoch={EPOCH}",
)
FOLDER = Path("logs/it/version_0/checkpoints")
MOVES = {
    "replay",
    "priorities",
    "drawing",
    "exploring",
    "weights",
    "target",
    "optimizer",
    "frames",
    "collected",
}
LAST, BEST = FOLDER / "last.ckpt", FOLDER / "best.ckpt"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(
    *options: str, stop: int | None = None, hook: str = "on_train_batch_end", snapshots: str = "none"
) -> Done:
    """A run that is stopped at so many frames and writes what it was like to a folder, at start and end."""
    callbacks = [f"{{class_path: dqn_probes.Snapshots, init_args: {{folder: {snapshots}}}}}"]
    if stop is not None:
        init_args = f"{{name: SIGTERM, hook: {hook}, frames: {stop}}}"
        callbacks.append(f"{{class_path: probes.SignalAt, init_args: {init_args}}}")
    return run(*OPTIONS, f"--trainer.callbacks=[{', '.join(callbacks)}]", *options)


def stopped(*options: str, frames: int = STOPPED) -> None:
    done = fit(*options, stop=frames, snapshots="stopped")
    assert done.code == 143, done.err
    assert last()["frames"] == frames


def go_on(*options: str, **more: Any) -> Done:
    done = fit("--ckpt_path=last", *options, **more)
    assert done.code == 0, done.err
    return done


def last() -> dict[str, Any]:
    return dict(checkpoints.load(LAST))


def replays() -> list[str]:
    return [path.name for path in (FOLDER / "replay").iterdir()]


def start_again() -> None:
    """As it was when the run was stopped."""
    shutil.rmtree("logs", ignore_errors=True)
    shutil.copytree("copy", "logs")


@pytest.mark.parametrize(
    "options", [(), ("--data.storage=disk", "--data.priority_exponent=0")], ids=["", "disk"]
)
def test_everything_comes_back_and_two_resumes_are_one(options: tuple[str, ...]) -> None:
    stopped(*options)
    shutil.move("logs", "copy")
    before = dqn_probes.read("stopped", "end")
    assert before["frames"] == STOPPED
    assert before["windows"] == 50
    ends = []
    for name in ("first", "second"):
        start_again()
        assert replays() == [f"frames_{STOPPED}"]
        go_on(*options, snapshots=name)
        start = dqn_probes.read(name, "start")
        assert start.keys() == before.keys()
        for key in before:
            assert dqn_probes.same(start[key], before[key]), key
        assert replays() == [f"frames_{TOTAL}"]
        assert not list(FOLDER.rglob("*.partial"))
        ends.append(dqn_probes.read(name, "end"))
    assert ends[0]["frames"] == TOTAL
    for key in before:
        assert dqn_probes.same(*(end[key] for end in ends)), key
    # It did go on, and what is compared tells one moment from another.
    for key in MOVES - ({"priorities"} if options else set()):
        assert not dqn_probes.same(ends[0][key], before[key]), key


def test_what_is_left_is_the_run_up_to_there() -> None:
    """A run that is stopped at 160 frames leaves what one of 160 frames ends with, to the bit."""
    constant = ("--model.beta=1", "--model.anneal_lr=false")  # what depends on the budget
    stopped(*constant)
    shutil.rmtree("logs")
    assert fit(*constant, f"--model.total_frames={STOPPED}", snapshots="short").code == 0
    one, other = dqn_probes.read("stopped", "end"), dqn_probes.read("short", "end")
    for key in one:
        assert dqn_probes.same(one[key], other[key]), key


def test_rates_are_those_of_the_run_that_goes_on() -> None:
    """From its first update on: the saved optimizer remembers those of the run before."""
    stopped()
    go_on("--model.lr=0", "--model.weight_decay=0.5", snapshots="after")
    start, end = dqn_probes.read("after", "start"), dqn_probes.read("after", "end")
    assert not dqn_probes.same(start["optimizer"], end["optimizer"])  # it did learn
    assert dqn_probes.same(start["weights"], end["weights"])
    [optimizer] = last()["optimizer_states"]
    assert {(group["lr"], group["weight_decay"]) for group in optimizer["param_groups"]} == {(0.0, 0.5)}


def test_without_a_saved_replay_it_begins_with_an_empty_one() -> None:
    stopped("--data.save_replay=false")
    assert not (FOLDER / "replay").exists()
    assert "replay" not in last()["ReplayDataModule"]
    go_on("--data.save_replay=false", snapshots="after")
    start = dqn_probes.read("after", "start")
    assert start["windows"] == 0
    assert start["frames"] == STOPPED
    assert dqn_probes.same(start["weights"], dqn_probes.read("stopped", "end")["weights"])
    assert last()["frames"] == TOTAL
    # Two updates a block of 16 frames: at 32 to 160, and from 32 frames after it began to fill again on.
    assert last()["global_step"] == 2 * 9 + 2 * 5
    # The next checkpoint may have one again.
    go_on(f"--model.total_frames={TOTAL + EPOCH}")
    assert replays() == [f"frames_{TOTAL + EPOCH}"]


def test_not_saving_is_not_deleting_and_not_forgetting() -> None:
    stopped()
    go_on("--data.save_replay=false", snapshots="after")
    before = dqn_probes.read("stopped", "end")["replay"]
    assert dqn_probes.same(dqn_probes.read("after", "start")["replay"], before)
    assert "replay" not in last()["ReplayDataModule"]
    assert replays() == [f"frames_{STOPPED}"]
    done = go_on(f"--model.total_frames={TOTAL + EPOCH}", "--data.save_replay=false")
    assert f"\nthe replay is empty: learning goes on at frame {TOTAL + 32}\n" in done.out
    assert replays() == [f"frames_{STOPPED}"]


def test_going_on_with_an_empty_replay_though_one_was_saved() -> None:
    stopped()
    go_on("--data.load_replay=false", snapshots="after")
    start = dqn_probes.read("after", "start")
    assert start["windows"] == 0
    assert dqn_probes.same(start["weights"], dqn_probes.read("stopped", "end")["weights"])
    assert replays() == [f"frames_{TOTAL}"]  # the one before has been replaced, not only left


def test_filling_up_again_survives_a_stop() -> None:
    """Stopped 16 frames after it went on with an empty replay, it has 48 of 64 to wait."""
    waits = "--model.learning_starts=64"
    stopped(waits, "--data.save_replay=false")
    assert fit(waits, "--ckpt_path=last", stop=STOPPED + 16).code == 143
    assert replays() == [f"frames_{STOPPED + 16}"]
    go_on(waits)
    assert last()["global_step"] == 2 * 7 + 2 * 3  # at 64 to 160, and at 224 to 256


def evaluated_at() -> list[int]:
    return shown_at(FOLDER.parent, "val/return")


def test_best_without_its_replay() -> None:
    """Only the last checkpoint keeps one; the line says what to do, and that works."""
    stopped()
    best = checkpoints.load(BEST)["frames"]
    assert best < STOPPED
    before = evaluated_at()
    assert max(before) > best
    done = fit("--ckpt_path=best")
    assert done.code == 2
    [line] = done.err.splitlines()
    assert "no whole replay at " in line
    assert line.endswith(
        "start anew without --ckpt_path, or go on with an empty replay: --data.load_replay false"
    )
    assert replays() == [f"frames_{STOPPED}"]
    assert evaluated_at() == before  # a run that is refused forgets nothing
    assert fit("--ckpt_path=best", "--data.load_replay=false").code == 0
    assert evaluated_at() == list(range(EPOCH, TOTAL + 1, EPOCH))
    assert last()["frames"] == TOTAL


def test_a_run_that_has_not_learnt_yet_is_saved_too() -> None:
    """Lightning itself takes a run without optimizer steps for one with nothing to save."""
    waits = "--model.learning_starts=10000"
    stopped(waits)
    assert last()["global_step"] == 0
    go_on(waits, snapshots="after")
    start, before = dqn_probes.read("after", "start"), dqn_probes.read("stopped", "end")
    assert dqn_probes.same(start["replay"], before["replay"])
    assert last()["frames"] == TOTAL
    assert replays() == [f"frames_{TOTAL}"]


def test_a_finished_run_has_nothing_to_do() -> None:
    assert fit(snapshots="first").code == 0
    table = FOLDER / "replay" / f"frames_{TOTAL}" / "rank_0" / "windows.json"
    written = table.stat()
    go_on(snapshots="after")
    assert (table.stat().st_ino, table.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    for key, value in dqn_probes.read("first", "end").items():
        assert dqn_probes.same(dqn_probes.read("after", "end")[key], value), key


def test_stopped_again_before_the_first_block() -> None:
    """What last.ckpt refers to is not written, and for a moment missing, once more."""
    assert fit(stop=2 * EPOCH, hook="on_train_epoch_end").code == 143
    table = FOLDER / "replay" / f"frames_{2 * EPOCH}" / "rank_0" / "windows.json"
    written, checkpoint = table.stat(), LAST.stat()
    assert fit("--ckpt_path=last", stop=2 * EPOCH, hook="on_train_epoch_start").code == 143
    assert LAST.stat().st_mtime_ns > checkpoint.st_mtime_ns  # it was saved
    assert (table.stat().st_ino, table.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    go_on()
    assert last()["frames"] == TOTAL


def test_what_a_killed_run_left_is_cleared() -> None:
    """Killed while saving the replay, or before the checkpoint that refers to it was written."""
    stopped()
    saved = FOLDER / "replay"
    shutil.copytree(saved / f"frames_{STOPPED}", saved / "frames_176")
    (saved / f"frames_{EPOCH * 3}" / "rank_0.partial" / "sampler").mkdir(parents=True)
    go_on(snapshots="after")
    assert dqn_probes.same(
        dqn_probes.read("after", "start")["replay"], dqn_probes.read("stopped", "end")["replay"]
    )
    assert replays() == [f"frames_{TOTAL}"]
    assert [path.name for path in (saved / f"frames_{TOTAL}").iterdir()] == ["rank_0"]


def test_another_name_is_another_run() -> None:
    """It goes on with the other run's replay, and leaves it alone."""
    stopped()
    assert fit(f"--ckpt_path={LAST}", "--name=other", snapshots="other").code == 0
    assert replays() == [f"frames_{STOPPED}"]
    other = Path("logs/other/version_0/checkpoints")
    assert [path.name for path in (other / "replay").iterdir()] == [f"frames_{TOTAL}"]
    assert dqn_probes.same(
        dqn_probes.read("other", "start")["replay"], dqn_probes.read("stopped", "end")["replay"]
    )


def with_two(name: str, frames: int) -> list[dict[str, dict[str, Any]]]:
    """Goes on with two processes up to so many frames: what each was like at the start and at the end."""
    callbacks = f"[{{class_path: dqn_probes.Snapshots, init_args: {{folder: {name}}}}}]"
    options = [f"--trainer.callbacks={callbacks}", f"--model.total_frames={frames}", "--ckpt_path=last"]
    done = launch(Path.cwd(), [*LIT_RL, *OPTIONS, *DDP, *options])
    assert done.returncode == 0, done.stderr
    assert replays() == [f"frames_{frames}"]
    folders = sorted(path.name for path in (FOLDER / "replay" / f"frames_{frames}").iterdir())
    assert folders == ["rank_0", "rank_1"]
    return [{when: dqn_probes.read(name, when, rank) for when in ("start", "end")} for rank in (0, 1)]


def test_two_processes_have_a_replay_each() -> None:
    """A new process begins with an empty one; each gets its own back; one alone takes the first."""
    assert fit(snapshots="alone").code == 0
    first = with_two("first", TOTAL + 64)
    assert dqn_probes.same(first[0]["start"]["replay"], dqn_probes.read("alone", "end")["replay"])
    assert first[1]["start"]["windows"] == 0
    ends = [rank["end"] for rank in first]
    assert ends[1]["windows"] > 10
    for key in ("replay", "drawing", "exploring"):
        assert not dqn_probes.same(ends[0][key], ends[1][key]), key
    assert dqn_probes.same(ends[0]["weights"], ends[1]["weights"])
    second = with_two("second", TOTAL + 96)
    for before, after in zip(first, second, strict=True):
        for key in before["end"]:
            assert dqn_probes.same(after["start"][key], before["end"][key]), key
    done = go_on(f"--model.total_frames={TOTAL + 128}", snapshots="alone again")
    assert "2 processes have saved a replay: this run has 1 and leaves out the others" in done.out
    assert dqn_probes.same(dqn_probes.read("alone again", "start")["replay"], second[0]["end"]["replay"])
    assert [path.name for path in (FOLDER / "replay" / f"frames_{TOTAL + 128}").iterdir()] == ["rank_0"]
