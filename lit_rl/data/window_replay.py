"""Replay of whole windows on TorchRL's storage and its prioritized sampler.

Shapes: W windows stored, M drawn. A window keeps its place until the ring comes round to it and writes
another whole window there, so that none is ever a mixture of two.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import PrioritizedSampler, RandomSampler

from lit_rl.errors import UserError

FORMAT = "windows.json"  # what the windows of a saved replay look like, and its files
RANDOM_STATE, SAMPLER, WRITER = "random_state.npy", "sampler", "writer"


class Drawn(NamedTuple):
    """M windows."""

    windows: TensorDict
    """``[M]``"""
    weight: Tensor
    """Importance weights ``[M]``: ``(p_min / p_i) ** beta``, p_min of those drawn; ones where uniform."""
    indices: Tensor
    """int64 ``[M]``, for `WindowReplay.update_priority`."""


class WindowReplay:
    """A ring of windows, drawn uniformly or in proportion to ``priority ** alpha``.

    Prioritized replay is that of Schaul et al. 2016 (arXiv 1511.05952, section 3.3 and 3.4): a window's first
    priority is the highest that there has been, at least 1 (what their first one has), and importance weights
    are divided by the largest of those drawn.

    Args:
        capacity: windows.
        alpha: exponent of the priorities; 0 draws uniformly.
        storage: in `memory`, or memory-mapped on `disk` (large observations), in a folder that goes with
            this object.
        made_with: options that windows were cut out with; a replay of others is not loaded.
        seed: of the random state that draws.
        copies: how many such rings share memory and disk, one in each process of a machine; there must be
            room for all of them before the first fills.
    """

    def __init__(
        self,
        capacity: int,
        *,
        alpha: float = 0.0,
        storage: Literal["memory", "disk"] = "memory",
        made_with: Mapping[str, int] | None = None,
        seed: int = 0,
        copies: int = 1,
    ) -> None:
        self.capacity = capacity
        self.copies = copies
        self.made_with = made_with or {}
        self.alpha = alpha
        self.is_prioritized = alpha > 0
        self._scratch: tempfile.TemporaryDirectory | None = None
        ring: LazyTensorStorage | LazyMemmapStorage
        if storage == "disk":
            self._scratch = tempfile.TemporaryDirectory(prefix="lit_rl_replay_")
            ring = LazyMemmapStorage(capacity, scratch_dir=self._scratch.name)
        else:
            ring = LazyTensorStorage(capacity)
        if self.is_prioritized:
            need = 2 * 2 * 4 << capacity.bit_length()  # float32: a tree of sums, one of minima
            if not _fits_memory(need):
                raise UserError(
                    f"the priorities of {capacity} windows need {_mib(need)} of memory, which are not free: "
                    "lower buffer_size"
                )
        self._sampler = PrioritizedSampler(capacity, alpha, 0.0) if self.is_prioritized else RandomSampler()
        self._generator = torch.Generator().manual_seed(seed)
        self._buffer = ReplayBuffer(storage=ring, sampler=self._sampler, generator=self._generator)

    def __len__(self) -> int:
        return len(self._buffer)

    def extend(self, windows: TensorDict) -> None:
        """Stores windows ``[W]``, over the oldest ones once the ring is full.

        Raises `UserError` where the first ones show that there is no room for the ring.
        """
        if not len(windows):
            return
        if not len(self):
            self._require_room(windows)
        self._buffer.extend(windows[-self.capacity :])

    def _require_room(self, windows: TensorDictBase) -> None:
        need = windows[0].bytes() * self.capacity * self.copies
        if self._scratch is None:
            if not _fits_memory(need):
                raise UserError(
                    f"the replay needs {_mib(need)} of memory, which are not free: lower buffer_size, or set "
                    "--data.storage disk"
                )
        elif shutil.disk_usage(self._scratch.name).free < need:  # see `save`
            raise UserError(
                f"the replay needs {_mib(need)} at {self._scratch.name}, which are not free: make room, "
                "lower buffer_size, or set TMPDIR to another disk"
            )

    def sample(self, size: int, *, beta: float = 1.0) -> Drawn:
        """Draws windows, with replacement.

        Args:
            size: M.
            beta: how much of the bias of prioritized drawing the weights correct, 0 to 1.
        """
        if self.is_prioritized:
            self._sampler.beta = beta
        windows, info = self._buffer.sample(size, return_info=True)
        weight = info.get("priority_weight")
        # TorchRL's are relative to the least priority of all windows: one of them would scale every loss.
        weight = torch.ones(size) if weight is None else (weight / weight.max()).float()
        return Drawn(windows, weight, info["index"])

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        """New priorities ``[M]``, above 0, of the windows at `index`."""
        if self.is_prioritized:
            self._buffer.update_priority(index, priority)

    # ------------------------------------------------------------------ on disk

    def save(self, folder: Path) -> None:
        """Writes everything, random state included, to a new `folder`; raises `UserError` if it cannot.

        It is written beside its place and then renamed: a folder of that name is whole.
        """
        partial = folder.with_name(folder.name + ".partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            stored = self._stored()
            need = 2**20 + 16 * self.capacity + (0 if stored is None else stored.bytes())
            if shutil.disk_usage(partial).free < need:  # a memory map that finds no room kills the process
                raise OSError(f"{_mib(need)} are needed and not free")
            np.save(partial / RANDOM_STATE, self._generator.get_state().numpy())
            if stored is not None:
                for name, leaf in _leaves(stored).items():
                    np.save(partial / _file(name), _as_bytes(leaf))
                self._sampler.dumps(partial / SAMPLER)
                self._buffer.writer.dumps(partial / WRITER)
            files = {str(path.relative_to(partial)): path.stat().st_size for path in _files(partial)}
            (partial / FORMAT).write_text(json.dumps(self._format(stored) | {"files": files}))
            for path in _files(partial):  # a disk may have no room for what it has taken, and says so here
                _sync(path)
            # Of a run that was killed before it could refer to it, or that went on here with an empty replay.
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = " ".join(str(error).split())
            raise UserError(
                f"cannot write the replay to {folder} ({reason}): what was saved before is whole; make room, "
                "then go on with --ckpt_path last, or do without it: --data.save_replay false"
            ) from error

    def load(self, folder: Path, like: TensorDict) -> None:
        """Reads what `save` wrote; raises `UserError` if it is damaged or holds other windows than `like`."""
        instead = "start anew without --ckpt_path, or go on with an empty replay: --data.load_replay false"
        if not (folder / FORMAT).is_file():
            raise UserError(f"no whole replay at {folder}: {instead}")
        try:
            saved = json.loads((folder / FORMAT).read_text())
            files = saved.pop("files")
            mine = self._format(like) | {"windows": saved["windows"]}
            different = [key for key in mine | saved if saved.get(key) != mine.get(key)]
            if saved["windows"] and different:
                key = different[0]
                raise UserError(
                    f"the replay at {folder} holds other windows: {key} is {saved.get(key, 'absent')} there "
                    f"and {mine.get(key, 'absent')} in this run: use the options of the run that made it, or "
                    "go on with an empty replay: --data.load_replay false"
                )
            for name, size in files.items():  # a memory map would fill up with zeros what is cut off
                if (folder / name).stat().st_size != size:
                    raise ValueError(f"{name} is cut off")
            self._generator.set_state(torch.from_numpy(np.load(folder / RANDOM_STATE)))
            if saved["windows"]:
                self._sampler.loads(folder / SAMPLER)
                if self.is_prioritized:
                    self._sampler.alpha = self.alpha  # this run's, applied to the saved priorities
                windows = _read(folder, like, saved["windows"])
                self._require_room(windows)
                self._buffer.storage.set(torch.arange(len(windows)), windows)
                self._buffer.writer.loads(folder / WRITER)
        except UserError:
            raise
        except Exception as error:  # whatever damage does to TorchRL's files
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"the replay at {folder} is damaged ({reason}): {instead}") from error

    def _stored(self) -> TensorDictBase | None:
        return self._buffer.storage[:] if len(self) else None

    def _format(self, windows: TensorDictBase | None) -> dict[str, object]:
        leaves = {} if windows is None else _leaves(windows)
        shapes = {name: f"{list(leaf.shape[1:])} {leaf.dtype}" for name, leaf in leaves.items()}
        return {
            **self.made_with,  # first, as what a message names if several things differ
            "capacity": self.capacity,
            "prioritized": self.is_prioritized,
            "windows": 0 if windows is None else len(windows),
            **shapes,
        }


def _fits_memory(size: int) -> bool:
    """Whether the system grants so many bytes, which costs nothing; it may promise more than there are."""
    try:
        torch.empty(size, dtype=torch.uint8)
    except RuntimeError:
        return False
    return True


def _leaves(windows: TensorDictBase) -> dict[str, Tensor]:
    """Each tensor ``[W, ...]`` by its path, joined by dots."""
    return dict(windows.flatten_keys(".").items())


def _file(name: str) -> str:
    """An entry of a Dict observation may be called anything."""
    return f"{quote(name, safe='')}.npy"


def _as_bytes(leaf: Tensor) -> np.ndarray:
    """Any tensor ``[W, ...]`` as bytes ``[W, B]``: numpy does not have all types. Shares memory."""
    return leaf.as_subclass(Tensor).unsqueeze(-1).flatten(1).view(torch.uint8).numpy()


def _read(folder: Path, like: TensorDictBase, count: int, prefix: str = "") -> TensorDict:
    """Windows ``[count]`` of the form of `like`, from the files of `save`, mapped and not yet read."""
    parts: dict[str, Tensor | TensorDict] = {}
    for key, part in like.items():
        if isinstance(part, TensorDictBase):
            parts[key] = _read(folder, part, count, f"{prefix}{key}.")
        elif 0 in part.shape[1:]:  # a memory with nothing in it
            parts[key] = part.new_empty(count, *part.shape[1:])
        else:
            content = torch.from_numpy(np.load(folder / _file(prefix + key), mmap_mode="c"))
            parts[key] = content.view(part.dtype).view(count, *part.shape[1:])
    return TensorDict(parts, [count, *like.batch_size[1:]])


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
