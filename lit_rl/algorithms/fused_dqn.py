"""The TD loss and its gradients without autograd, for small networks on the CPU.

Where networks are small, autograd's bookkeeping costs more than their arithmetic. The numbers are those of
`WindowLoss.predict`, to rounding.

Shapes: as in `lit_rl.algorithms.window_loss`; F features.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch

from lit_rl.algorithms.window_loss import Lesson, Prediction, WindowLoss, best
from lit_rl.compiled import Array, arrays, can_be_compiled
from lit_rl.models.fused import FusedQNetwork, fused_q_for_learning
from lit_rl.models.q_heads import ExpectedQ, half_squared, huber
from lit_rl.models.q_network import QNetwork


class FusedTDLoss:
    """Loss and gradients of a batch, where the Q-network is a perceptron."""

    def __init__(self, network: FusedQNetwork, loss: WindowLoss, head: ExpectedQ) -> None:
        from lit_rl.compiled.losses import td_loss_and_gradient

        self._loss_and_gradient = td_loss_and_gradient
        self._features, self._layers = network.features, network.layers
        self._loss, self._head, self._is_clipped = loss, head, head.error is huber

    def takes(self, lesson: Lesson) -> bool:
        """Whether it is in float32 and of the shapes it should be: compiled loops check no bounds."""
        bootstrap = [] if lesson.bootstrap is None else [lesson.bootstrap]
        floats = [lesson.reward, lesson.discount, lesson.weight, *bootstrap]
        if not can_be_compiled(lesson.target, *floats) or lesson.target.dtype != torch.float32:
            return False
        return all(tensor.shape[:2] == lesson.counts.shape for tensor in (lesson.action, *floats))

    def __call__(self, lesson: Lesson) -> Prediction:
        """What `WindowLoss.predict` returns, without a graph; the parameters' gradients set."""
        learnt, layers = self._loss.window - self._loss.loss_steps, self._layers
        outputs = layers(self._of_steps(lesson, learnt, self._loss.window))
        bootstrap_MLZ = lesson.bootstrap
        if bootstrap_MLZ is None:
            judge = layers(self._of_steps(lesson, learnt + 1, self._loss.window + self._loss.n_step))[-1]
            judge_MTAZ = torch.from_numpy(judge).view_as(lesson.target)
            bootstrap_MLZ = best(lesson.target, judge_MTAZ, lesson.at, self._head)
        given = (lesson.action, lesson.reward, lesson.discount, bootstrap_MLZ, lesson.weight, lesson.counts)
        loss, predicted, grad = self._loss_and_gradient(
            outputs[-1], *arrays(*(tensor.flatten() for tensor in given)), is_clipped=self._is_clipped
        )
        if not math.isfinite(loss):  # an error that is clipped has a finite gradient even so
            grad[:] = np.nan
        layers.set_gradients(outputs, grad)
        predicted_MLZ = torch.from_numpy(predicted).view_as(bootstrap_MLZ)
        return Prediction(torch.from_numpy(loss), None, predicted_MLZ, bootstrap_MLZ, None, None)

    def _of_steps(self, lesson: Lesson, start: int, stop: int) -> Array:
        """Features of these steps of all windows, ``[M (stop - start), F]``."""
        return self._features(lesson.seen.observation[:, start:stop].flatten(0, 1).numpy())


def fused_td_loss(agent: QNetwork, loss: WindowLoss, batch_size: int) -> FusedTDLoss | None:
    """For batches of so many windows; None where autograd is needed, or no slower."""
    if type(loss) is not WindowLoss or "predict" in vars(loss) or loss.latents:
        return None
    steps = loss.loss_steps + loss.n_step - 1 if loss.double else loss.loss_steps
    network = fused_q_for_learning(agent, batch_size * steps)
    if network is None or agent.head.error not in (huber, half_squared):
        return None
    return FusedTDLoss(network, loss, cast(ExpectedQ, agent.head))
