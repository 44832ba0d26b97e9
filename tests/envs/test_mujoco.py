"""MuJoCo talks through logging, not on its own."""

from pathlib import Path

import pytest

from lit_rl.envs import EnvConfig


def test_nothing_is_printed_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    EnvConfig("HalfCheetah-v5", num_envs=1).make().close()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
