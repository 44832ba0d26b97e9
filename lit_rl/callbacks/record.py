"""A training run's folder, and what it leaves there: configuration, hyper-parameters, learning curve."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rl.algorithms.base import LitAgent
from lit_rl.ranks import is_first

CURVES = {"episode/return": "training episodes", "val/return": "evaluation"}


class RunLogger(TensorBoardLogger):
    """Claims the folder of its version, so that runs of one name that start together get one each."""

    def _get_next_version(self) -> int:
        version = super()._get_next_version()
        while is_first():  # the others are told the folder
            try:
                Path(self.root_dir, f"version_{version}").mkdir(parents=True)
                break
            except FileExistsError:
                version += 1
        return version


class RunRecord(L.Callback):
    """Writes `config.yaml`, its text and the final metrics to TensorBoard, and `learning_curve.png`.

    The configuration also travels in every checkpoint, so that a checkpoint alone can be evaluated.

    Args:
        config: the resolved configuration as YAML.
    """

    def __init__(self, config: str) -> None:
        self.config = config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not at set-up: whatever is wrong with a configuration or a replay has been found by now.
        folder = trainer.log_dir  # asks all processes: every one must come by
        if trainer.is_global_zero and trainer.loggers and folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, "config.yaml").write_text(self.config)
            if isinstance(trainer.logger, TensorBoardLogger):
                assert isinstance(pl_module, LitAgent)
                forget_after(pl_module.frames, trainer.logger)
                trainer.logger.hparams.update(flatten(yaml.safe_load(self.config)))  # for its hparams.yaml
                trainer.logger.experiment.add_text("config", f"```yaml\n{self.config}\n```")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logger = trainer.logger
        if not trainer.is_global_zero or not isinstance(logger, TensorBoardLogger):
            return
        assert isinstance(pl_module, LitAgent)
        final = {
            f"final/{key}": float(value) for key, value in trainer.callback_metrics.items() if "/" in key
        }
        logger.log_hyperparams(flatten(yaml.safe_load(self.config)), final, step=pl_module.frames)
        logger.experiment.flush()
        draw_learning_curve(Path(logger.log_dir))


def forget_after(frames: int, logger: TensorBoardLogger) -> None:
    """What a killed run wrote after its checkpoint is seen no more: it is trained again."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    start = Event(step=frames + 1, session_log=SessionLog(status=SessionLog.START))
    logger.experiment.file_writer.add_event(start)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys; `init_args` is left out of the names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        flat |= flatten(value, name)
    return flat


def draw_learning_curve(run: Path) -> Path | None:
    """Draws the returns in a run's TensorBoard events to `learning_curve.png`; None if there are none."""
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # It tells, at length, that a resumed run has purged what came after its checkpoint.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    drawn = [tag for tag in CURVES if tag in events.Tags()["scalars"]]
    for tag in drawn:
        # A resumed run repeats the frames after its checkpoint: the later value counts.
        points = dict(sorted({event.step: event.value for event in events.Scalars(tag)}.items()))
        style = {"linewidth": 2, "marker": "o"} if tag == "val/return" else {"linewidth": 1, "alpha": 0.5}
        axes.plot(list(points), list(points.values()), label=CURVES[tag], **style)
    if not drawn:
        return None
    axes.set(xlabel="environment frames", ylabel="return", title=run.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = run / "learning_curve.png"
    figure.savefig(path, dpi=120)
    return path
