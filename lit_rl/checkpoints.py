"""Checkpoints that are either whole or not there.

What a resumed run finds again, to the bit: weights, normalisation and reward statistics, the optimizer's
state, the frame count (and so learning rates and schedules), the best score, and the random states of
python, numpy, torch and (but for workers) action sampling, of every rank. Off-policy runs find their
target network, too, and go on with the replay that was saved with last.ckpt; other checkpoints have none of
their own. Two resumes from one checkpoint are equal.

What it does not: simulators cannot be saved, so every environment starts a new episode (other than the
first ones, seeded by the run's seed and the frame count), and with it memory, the discounted return that
scales rewards, and the mean return on the progress line start anew. A resumed run is therefore not the
run that was never interrupted. With more ranks than before, the new ones collect from their own seeds; with
fewer, the replays of the others are left out. Environments that draw from python's or numpy's global random
state (gymnasium's do not) share it with training, and their evaluations then disturb it. Steps of an
off-policy run that no whole window holds yet are not learnt from.
"""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from filelock import FileLock, Timeout
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_rl.algorithms.base import LitAgent
from lit_rl.errors import UserError
from lit_rl.ranks import together

# What a file system without locks says; a run goes without one there.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the destination, then renames: a process that dies in between costs nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            for left in target.parent.glob("*.partial"):  # by a process that was killed
                left.unlink()
        except (OSError, RuntimeError) as error:  # torch's writer turns some of the former into the latter
            partial.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(
                f"cannot write {target} ({reason}): the checkpoint before it is whole; make room, then go on "
                "with --ckpt_path last"
            ) from error


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt` after every epoch, and when the run is told to stop (see `callbacks.stop`).

    While a run trains no other process may train in the folder of its checkpoints.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
        self._frames_saved = 0
        self._lock: FileLock | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # before the checkpoint, or the replay beside it, is read
            together(lambda: self._claim_folder() if trainer.is_global_zero else None)

    def _claim_folder(self) -> None:
        folder = Path(str(self.dirpath))
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "run.lock", blocking=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is training with the checkpoints in {folder}: wait for it, stop it, or "
                "start anew without --ckpt_path"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        self._lock = lock

    def _leave_folder(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._leave_folder()

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        # Lightning goes by optimizer steps; before the first one there are frames, and a replay, to lose.
        self._last_global_step_saved = trainer.global_step if self._is_saved(trainer) else -1
        return super()._should_skip_saving_checkpoint(trainer)

    def _is_saved(self, trainer: L.Trainer) -> bool:
        return self._frames_saved == cast(LitAgent, trainer.lightning_module).frames

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        learner = cast(LitAgent, trainer.lightning_module)
        self._frames_saved = learner.frames
        learner.data.after_last_checkpoint()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # Any other exception may have left weights half-way through an update.
        told = isinstance(exception, SIGTERMException) and trainer.training
        try:
            if told and not self._is_saved(trainer):
                self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:
            self._leave_folder()


def is_whole(path: Path) -> bool:
    """Whether a file is a complete checkpoint (an archive whose parts all have their checksums)."""
    try:
        with zipfile.ZipFile(path) as archive:
            # What is marked as a folder, torch does not read: it would leave a tensor unset.
            folders = any(part.external_attr & 0x10 for part in archive.infolist())
            return archive.testzip() is None and not folders
    except Exception:  # whatever damage makes of an archive's tables
        return False


def newest_whole(root: Path, name: str = "last", *, versions: str = "**") -> Path | None:
    """A whole checkpoint of the newest run under `root` that has one; None if none has.

    `last` is a run's last.ckpt or, where that is damaged, its newest other one; any other name only itself.
    `versions` is where runs' folders lie: of one name ``*``, since another may be below it, of all ``**``.
    """
    runs: dict[Path, list[tuple[bool, float, Path]]] = {}
    for path in root.glob(f"{versions}/checkpoints/*.ckpt"):
        runs.setdefault(path.parent, []).append((path.stem == name, path.stat().st_mtime, path))
    for found in sorted(runs.values(), key=lambda found: max(time for _, time, _ in found), reverse=True):
        for is_named, _, path in sorted(found, reverse=True):
            if (is_named or name == "last") and is_whole(path):
                return path
    return None


def load(path: Path) -> Mapping[str, Any]:
    """A checkpoint's contents, on the CPU; raises `UserError` if the file is missing or damaged."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the path of a .ckpt file")
    if not is_whole(path):
        raise UserError(
            f"{path} is not a whole checkpoint (truncated or corrupt): use another, or start anew"
        )
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): use another"
        ) from error
    is_lightning = isinstance(contents, Mapping) and "pytorch-lightning_version" in contents
    if not is_lightning or not isinstance(contents.get("state_dict"), Mapping):
        raise UserError(f"{path} holds no Lightning checkpoint: give a file that `lit-rl fit` wrote")
    return contents
