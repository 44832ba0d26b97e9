"""Attention maps of one evaluation episode, as TensorBoard images over environment frames.

Shapes: B rows (one here), T steps, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_rl.algorithms.base import LitAgent

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.hooks import RemovableHandle

MAX_STEPS = 200


class AttentionMaps(L.Callback):
    """Draws what a trunk attends to, where it offers `attention_maps` (see `lit_rl.trunks.base`).

    It looks over the shoulder of the evaluation that is run anyway: the features that reach the trunk in the
    first episode of environment 0 are kept, and given to `attention_maps` in one pass when it is over. Of an
    agent that acts on windows, every step's map is of its window.

    Args:
        max_steps: of the episode that are drawn, from its start.
    """

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self.max_steps = max_steps
        self._features: list[Tensor] = []
        self._is_over = False
        self._hook: RemovableHandle | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitAgent)
        agent, logger = pl_module.agent, trainer.logger
        watched = hasattr(agent.trunk, "attention_maps") and isinstance(logger, TensorBoardLogger)
        if watched and trainer.is_global_zero and not trainer.sanity_checking:
            self._features, self._is_over = [], False
            self._hook = agent.acting_trunk.register_forward_pre_hook(self._keep)

    def _keep(self, trunk: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x_BTF, _, is_init_BT = inputs
        # A second start in row 0 is the next episode's.
        self._is_over |= len(self._features) == self.max_steps or bool(self._features and is_init_BT[0, 0])
        if not self._is_over:
            self._features.append(x_BTF[:1].clone())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()
        if not self._features:
            return
        assert isinstance(pl_module, LitAgent)
        assert isinstance(trainer.logger, TensorBoardLogger)
        trunk: Any = pl_module.agent.acting_trunk
        x_1TF, self._features = torch.cat(self._features, dim=1), []
        is_init_1T = torch.zeros(x_1TF.shape[:2], dtype=torch.bool, device=x_1TF.device)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            maps = trunk.attention_maps(x_1TF, trunk.initial_state(1), is_init_1T)
        if maps:  # a mixed trunk may hold no layer that attends
            figure = draw([attention[0].float().cpu() for attention in maps])
            trainer.logger.experiment.add_figure("attention", figure, pl_module.frames)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def draw(maps: list[Tensor]) -> Figure:
    """A panel for each layer's map ``[T, T]``, query down, key to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * len(maps) + 0.5, 3.5), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for layer, (axes, attention_TT) in enumerate(zip(panels, maps, strict=True)):
        image = axes.imshow(attention_TT.numpy(), vmin=0.0, aspect="auto", interpolation="nearest")
        axes.set(title=f"layer {layer}", xlabel="key step", ylabel="query step")
        figure.colorbar(image, ax=axes)
    return figure
