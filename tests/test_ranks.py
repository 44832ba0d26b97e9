"""Which process speaks for all, and processes that do not agree."""

import pytest
from helpers import train, walk

from lit_rl.data import base
from lit_rl.errors import UserError
from lit_rl.ranks import is_first


@pytest.mark.parametrize(
    ("told", "speaks"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),  # torchrun, on a second machine
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),  # Lightning, on a second machine
        ({"SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # started by Lightning within a job
    ],
)
def test_one_process_speaks(monkeypatch: pytest.MonkeyPatch, told: dict[str, str], speaks: bool) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert is_first() == speaks


def test_processes_go_on_from_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that found none, or another, would be at other frames: they would not stop together."""
    monkeypatch.setattr(base, "gather_list", lambda mine: [*mine, "last.ckpt (96 frames)"])
    with pytest.raises(UserError, match=r"checkpoints, none \(0 frames\) and last.ckpt \(96 frames\): give"):
        train(walk(), rollouts=1)
