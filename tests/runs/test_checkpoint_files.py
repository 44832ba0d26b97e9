"""Files of checkpoints: whole or not there, whatever happens while they are written or afterwards."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl import checkpoints
from lit_rl.errors import UserError

FULL = Path("/dev/full")  # every write says "no space left on device"


def contents(marker: int = 0) -> dict[str, Any]:
    return {
        "pytorch-lightning_version": "2.6",
        "state_dict": {"weight": torch.arange(4000.0) + marker},
        "frames": marker,
    }


def save(path: Path, marker: int = 0, age: float = 0.0) -> Path:
    checkpoints.AtomicCheckpointIO().save_checkpoint(contents(marker), path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def frames(path: Path) -> int:
    return checkpoints.load(path)["frames"]


def test_a_write_that_dies_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "checkpoints" / "last.ckpt", 1)
    whole = path.read_bytes()

    class Killed(BaseException):
        pass

    def dies(checkpoint: Any, file: Any) -> None:
        file.write(whole[: len(whole) // 2])
        file.flush()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dies)
        with pytest.raises(Killed):
            save(path, 2)
    partial = path.with_suffix(".partial")
    assert partial.stat().st_size == len(whole) // 2
    assert not checkpoints.is_whole(partial)
    assert path.read_bytes() == whole
    assert checkpoints.newest_whole(tmp_path) == path

    save(path.with_name("best.ckpt"), 3)
    assert not partial.exists()
    save(path, 3)
    assert frames(path) == 3


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", 1)
    path.with_suffix(".partial").symlink_to(FULL)
    with pytest.raises(
        UserError, match=r"cannot write .*last\.ckpt \(No space left on device\).*whole"
    ) as error:
        save(path, 2)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert frames(path) == 1
    save(path, 3)
    assert frames(path) == 3


def test_damage_is_seen(tmp_path: Path) -> None:
    """Any cut, any changed byte: refused in one line, or (in a gap of the archive) without effect."""
    whole = save(tmp_path / "last.ckpt", 1).read_bytes()
    rng = random.Random(0)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(50)] + [b"", whole[:-1]]
    for _ in range(300):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        damaged.append(bytes(changed))
    # Most of the file is one tensor: its tables deserve blows of their own.
    for position in range(len(whole) - 600, len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0xFF
        damaged.append(bytes(changed))
    path, refused = tmp_path / "damaged.ckpt", 0
    for data in damaged:
        path.write_bytes(data)
        try:
            found = checkpoints.load(path)
        except UserError as error:
            refused += "\n" not in str(error)
        else:
            assert torch.equal(found["state_dict"]["weight"], contents(1)["state_dict"]["weight"])
            assert found["frames"] == 1
    assert refused > 0.75 * len(damaged)  # the rest hit dates and padding


def test_last_falls_back_within_its_run(tmp_path: Path) -> None:
    old, new = (tmp_path / f"version_{n}" / "checkpoints" for n in (0, 1))
    save(old / "last.ckpt", 10, age=100)
    save(new / "best.ckpt", 20, age=50)
    save(new / "epoch=3.ckpt", 30, age=40)
    last = save(new / "last.ckpt", 40, age=60)  # the named one counts, not the newest
    assert frames(checkpoints.newest_whole(tmp_path)) == 40
    halve(last)
    assert frames(checkpoints.newest_whole(tmp_path)) == 30
    assert frames(checkpoints.newest_whole(tmp_path, "best")) == 20
    halve(new / "epoch=3.ckpt")
    assert frames(checkpoints.newest_whole(tmp_path)) == 20
    last.unlink()
    assert frames(checkpoints.newest_whole(tmp_path)) == 20
    halve(new / "best.ckpt")
    assert frames(checkpoints.newest_whole(tmp_path)) == 10
    assert checkpoints.newest_whole(tmp_path, "best") is None
    below = save(tmp_path / "other" / "version_0" / "checkpoints" / "last.ckpt", 50)
    assert checkpoints.newest_whole(tmp_path) == below
    assert frames(checkpoints.newest_whole(tmp_path, versions="*")) == 10
    below.unlink()
    (old / "last.ckpt").rename(old / "last.partial")
    assert checkpoints.newest_whole(tmp_path) is None
