"""The command in a folder of its own, and one tiny trained run that many tests look at."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import CARTPOLE, TINY, Command, Trained, listing, run


@pytest.fixture
def lit_rl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `lit-rl ARGUMENTS` in a folder of its own, which is now the current one."""
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def fit(lit_rl: Command) -> Command:
    """A tiny `fit` of the CartPole configuration with more options."""
    return lambda *options: lit_rl("fit", "--config", CARTPOLE, *TINY, *options)


@pytest.fixture
def refused(tmp_path: Path, lit_rl: Command) -> Callable[..., str]:
    """Runs a command that must be refused: code 2, one line (which it returns), nothing written."""

    def refuse(*arguments: object) -> str:
        before = listing(tmp_path)
        done = lit_rl(*arguments)
        assert done.code == 2, done
        [line] = done.err.splitlines()
        assert line.startswith("lit-rl: error: ")
        assert "Traceback" not in done.out
        assert listing(tmp_path) == before
        return line

    return refuse


@pytest.fixture
def refused_fit(refused: Callable[..., str]) -> Callable[..., str]:
    """The same for the tiny `fit` with more options."""
    return lambda *options: refused("fit", "--config", CARTPOLE, *TINY, *options)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny run on CartPole with normalised observations."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        done = run("fit", "--config", CARTPOLE, *TINY, "--model.normalize_observation=true", "--name=tiny")
    assert done.code == 0, done.err
    return Trained(folder, folder / "logs/tiny/version_0/checkpoints/last.ckpt", done)
