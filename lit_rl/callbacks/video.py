"""Evaluation videos, as animated GIFs: to a folder, and to TensorBoard's images."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import cast

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rl.algorithms.base import LitAgent
from lit_rl.errors import UserError

MAX_FRAMES = 300


class EvaluationVideo(L.Callback):
    """Films one evaluation episode when training ends (where the environment can be drawn) or after a test.

    Args:
        folder: where a test's video goes; without it, tests are not filmed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logger = trainer.logger
        if not trainer.is_global_zero or not isinstance(logger, TensorBoardLogger):
            return
        assert isinstance(pl_module, LitAgent)
        try:
            gif = film(trainer)
        except UserError as reason:
            print(f"no evaluation video: {reason}")
            return
        add_gif(logger, "evaluation", gif, pl_module.frames)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.folder is not None and trainer.is_global_zero:
            gif = film(trainer)
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "evaluation.gif"
            path.write_bytes(gif)
            print(f"video: {path}")


def film(trainer: L.Trainer) -> bytes:
    """One evaluation episode as a GIF; raises `UserError` where the environment cannot be drawn."""
    data = cast(LitAgent, trainer.lightning_module).data
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws to memory: no display is looked for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # renderers tell their troubles twice
            [episode] = data.rendered_episode(MAX_FRAMES)
        return encode_gif(episode.frames)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{data.env.id} cannot be drawn here ({type(error).__name__}: {' '.join(str(error).split())}); "
            "install what its renderer needs"
        ) from error


def encode_gif(frames: list[np.ndarray], fps: int = 30) -> bytes:
    """An animated GIF of pictures ``[height, width, 3]`` uint8."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
    return buffer.getvalue()


def add_gif(logger: TensorBoardLogger, tag: str, gif: bytes, step: int) -> None:
    """Shows a GIF under TensorBoard's images (torch's own `add_video` needs a moviepy before 2.0)."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(colorspace=3, encoded_image_string=gif)
    logger.experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
