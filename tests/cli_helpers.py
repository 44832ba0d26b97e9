"""The command run in this process, and what it is run with."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rl.__main__ import main

ROOT = Path(__file__).parents[1]
CARTPOLE = ROOT / "configs" / "ppo_cartpole.yaml"
# 2 rollouts of 2 environments x 16 steps, an epoch each; evaluations of 2 episodes.
TINY = (
    "--env.num_envs=2",
    "--data.rollout_length=16",
    "--data.frames_per_epoch=32",
    "--model.total_frames=64",
    "--model.num_minibatches=2",
    "--episodes=2",
)


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Trained:
    """What `fit` left behind and printed."""

    folder: Path
    checkpoint: Path
    done: Done


Command = Callable[..., Done]


def run(*arguments: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # --help and --print_config
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def shown_at(folder: Path, tag: str) -> list[int]:
    """The frames at which a run's TensorBoard shows a value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in events.Scalars(tag)]


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } | {str(path.relative_to(folder)): b"" for path in folder.rglob("*") if path.is_dir()}
