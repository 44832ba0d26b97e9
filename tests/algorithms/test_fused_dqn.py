"""The TD loss without autograd: its numbers are autograd's, and who it is not for."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import Q_HEADS, Balanced, made_of_another, nothing, patched, replaced, walk
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl import keys
from lit_rl.algorithms.dqn import LitDQN
from lit_rl.algorithms.fused_dqn import FusedTDLoss
from lit_rl.algorithms.window_loss import Lesson, Prediction, WindowLoss
from lit_rl.data.window_replay import Drawn
from lit_rl.models.q_heads import ExpectedQ
from lit_rl.models.q_network import QNetwork
from lit_rl.trunks import GRU, MLP

torch.set_num_threads(1)

M = 20  # windows


def about_to_learn(model: LitDQN) -> LitDQN:
    """With its optimizer, as in a Trainer's hands."""
    trainer: Any = SimpleNamespace(optimizers=[model.configure_optimizers()])
    model.trainer = trainer
    return model


def make(trunk: Any = None, algorithm: type[LitDQN] = LitDQN, **options: Any) -> LitDQN:
    """Whose weights are all clearly not zero, and others in the target network."""
    torch.manual_seed(0)
    model = about_to_learn(algorithm(walk(), trunk or partial(MLP, d_model=9), batch_size=M, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


def lesson(model: LitDQN, **changed: Tensor) -> Lesson:
    """Of windows whose episodes end here and there, some of them cut short; errors below and above 1."""
    torch.manual_seed(1)
    shape = model.window_shape
    T = shape.window + shape.lookahead
    steps = {
        keys.OBSERVATION: torch.randn(M, T, 2),
        keys.ACTION: torch.randint(3, (M, T)),
        keys.REWARD: torch.randn(M, T),
        keys.TERMINATED: torch.rand(M, T) < 0.2,
        keys.IS_INIT: torch.zeros(M, T, dtype=torch.bool),
        keys.HAS_ACTION: torch.rand(M, T) < 0.9,
    }
    if shape.with_latent:
        steps[keys.LATENT] = torch.randn(M, T, 9)
    windows = TensorDict({keys.STEPS: TensorDict(steps | changed, [M, T])}, [M])
    return model.loss.lesson(model.target, Drawn(windows, torch.rand(M), torch.arange(M)))


def told(prediction: Prediction, model: LitDQN) -> list[Tensor]:
    assert prediction[1] is prediction[4] is prediction[5] is None
    grads = [parameter.grad for parameter in model.agent.parameters()]
    assert all(grad is not None and grad.abs().max() > 1e-4 for grad in grads)
    return [prediction.loss.detach(), prediction.predicted, prediction.bootstrap, *grads]


def by_autograd(model: LitDQN, given: Lesson) -> list[Tensor]:
    model.agent.zero_grad()
    return told(model._descend(given), model)


def fused_loss(model: LitDQN, given: Lesson) -> FusedTDLoss:
    loss = model._fused_loss()
    assert loss is not None
    assert loss.takes(given)
    return loss


def without(model: LitDQN, given: Lesson) -> list[Tensor]:
    model.agent.zero_grad()
    loss = fused_loss(model, given)
    return told(loss(given), model)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("error", ["huber", "mse"])
@pytest.mark.parametrize(
    "window", [{}, {"window": 5, "loss_steps": 2, "n_step": 3}, {"window": 3, "burn_in": 1}], ids=str
)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("n_layers", "activation", "encoder_width"), [(1, "tanh", None), (3, "relu", None), (2, "tanh", 7)]
)
def test_numbers_are_those_of_autograd(
    n_layers, activation, encoder_width, double, window, error, normalized
) -> None:
    model = make(
        partial(MLP, d_model=9, n_layers=n_layers, activation=activation),
        head=partial(ExpectedQ, loss=error),
        encoder_width=encoder_width,
        double=double,
        normalize_observation=normalized,
        **window,
    )
    model.agent.update_normalization(3 * torch.randn(50, 1, 2) + 2)
    given = lesson(model)
    torch.testing.assert_close(without(model, given), by_autograd(model, given), atol=4e-6, rtol=1e-5)


def test_by_hand() -> None:
    """Q-tables of three states; online 1 2 | 3 0 | 0 5, target 10 20 | 30 40 | 60 50; gamma 1/2, double."""
    one_hot = spaces.Box(0.0, 1.0, (3,), np.float32)
    env: Any = SimpleNamespace(id="table", spaces=lambda: (one_hot, spaces.Discrete(2)))
    trunk = partial(MLP, d_model=3, n_layers=1, activation="relu")
    model = about_to_learn(LitDQN(env, trunk, gamma=0.5, window=2, batch_size=1))
    tables = ([[1.0, 2.0], [3.0, 0.0], [0.0, 5.0]], [[10.0, 20.0], [30.0, 40.0], [60.0, 50.0]])
    with torch.no_grad():
        for network, values in zip((model.agent, model.target), tables, strict=True):
            network.trunk.layers[0].weight.copy_(torch.eye(3))
            network.head.last.weight.copy_(torch.tensor(values).T)
            network.head.last.bias.zero_()
    steps = {
        keys.OBSERVATION: torch.eye(3)[None],
        keys.ACTION: torch.tensor([[0, 1, 0]]),
        keys.REWARD: torch.tensor([[1.0, 2.0, 9.0]]),
        keys.TERMINATED: torch.zeros(1, 3, dtype=torch.bool),
        keys.IS_INIT: torch.zeros(1, 3, dtype=torch.bool),
        keys.HAS_ACTION: torch.ones(1, 3, dtype=torch.bool),
    }
    windows = TensorDict({keys.STEPS: TensorDict(steps, [1, 3])}, [1])
    given = model.loss.lesson(model.target, Drawn(windows, torch.tensor([0.5]), torch.zeros(1).long()))
    loss = fused_loss(model, given)
    prediction = loss(given)
    # Targets 1 + 30/2 and 2 + 50/2: errors of 15 and 27, by Huber half less; the weight halves them.
    assert prediction.predicted.tolist() == [[[1.0], [0.0]]]
    assert prediction.bootstrap.tolist() == [[[30.0], [50.0]]]
    assert prediction.loss.item() == pytest.approx(0.5 * (14.5 + 26.5) / 2)
    # Slopes of -1, halved by the weight and halved again as a mean of two.
    assert model.agent.head.last.weight.grad.tolist() == [[-0.25, 0, 0], [0, -0.25, 0]]
    assert model.agent.head.last.bias.grad.tolist() == [-0.25, -0.25]


def test_weights_that_moved_are_seen() -> None:
    model = make()
    given = lesson(model)
    loss = fused_loss(model, given)
    before = loss(given).loss
    with torch.no_grad():
        for parameter in model.agent.parameters():
            parameter.mul_(1.1)
    now = loss(given).loss
    assert abs(now - before) > 1e-3
    torch.testing.assert_close(now, by_autograd(model, given)[0])


@pytest.mark.parametrize("reward", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(reward: float) -> None:
    model = make()
    rewards = torch.randn(M, 2)
    rewards[3] = reward
    given = lesson(model, **{keys.REWARD: rewards, keys.HAS_ACTION: torch.ones(M, 2, dtype=torch.bool)})
    loss = fused_loss(model, given)
    assert not loss(given).loss.isfinite()
    assert not any(parameter.grad.isfinite().any() for parameter in model.agent.head.parameters())


def changed(change: Callable[[QNetwork], Any]) -> LitDQN:
    model = make()
    change(model.agent)
    return model


class OwnPrediction(LitDQN):
    def _predict(self, lesson: Lesson) -> Prediction:
        return super()._predict(lesson)


class Wrapped(LitDQN):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        predict = self._predict
        self._predict = lambda lesson: predict(lesson)


class OwnOptimizer(LitDQN):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.agent.parameters(), lr=1.0)


class Tripled(LitDQN):
    def _descend(self, lesson: Lesson) -> Prediction:
        prediction = super()._descend(lesson)
        for parameter in self.agent.parameters():
            parameter.grad *= 3
        return prediction


class OwnValues(ExpectedQ):
    def values(self, out: Tensor) -> Tensor:
        return -super().values(out)


class OwnNetwork(QNetwork):
    def of_latent(self, latent: Tensor) -> Tensor:
        return 2 * super().of_latent(latent)


class OwnLoss(WindowLoss):
    def predict(self, agent: QNetwork, lesson: Lesson) -> Prediction:
        prediction = super().predict(agent, lesson)
        return prediction._replace(loss=2 * prediction.loss)


def own_network() -> LitDQN:
    model = make()
    model.agent.__class__ = OwnNetwork
    return model


def own_loss() -> LitDQN:
    model = make()
    model.loss = OwnLoss(**vars(model.loss))
    return model


def wrapped_loss() -> LitDQN:
    model = make()
    vars(model.loss)["predict"] = model.loss.predict
    return model


def norm_that_learns() -> LitDQN:
    model = make(normalize_observation=True)
    model.agent.norms[0] = nn.LayerNorm(2)
    return model


def tied(agent: QNetwork) -> None:
    agent.trunk.layers[1].bias = agent.trunk.layers[0].bias


NOT_FUSED: dict[str, Callable[[], LitDQN]] = {
    "recurrent": lambda: make(partial(GRU, d_model=9)),
    "silu": lambda: make(partial(MLP, d_model=9, activation="silu")),
    "dueling": lambda: make(head=partial(ExpectedQ, dueling=True)),
    "hidden layer": lambda: make(head=partial(ExpectedQ, hidden=5)),
    "categorical": lambda: make(head=Q_HEADS["categorical"]),
    "quantile": lambda: make(head=Q_HEADS["quantile"]),
    "latents": lambda: make(latents=True),
    "its own prediction": lambda: make(algorithm=OwnPrediction),
    "a prediction wrapped": lambda: make(algorithm=Wrapped),
    "its own optimizer": lambda: make(algorithm=OwnOptimizer),
    "gradients of its own": lambda: make(algorithm=Tripled),
    "an auxiliary loss": lambda: make(partial(Balanced, d_model=9)),
    "subclass of the head": lambda: make(head=OwnValues),
    "subclass of the network": own_network,
    "subclass of the loss": own_loss,
    "a loss wrapped": wrapped_loss,
    "norm that learns": norm_that_learns,
} | {
    name: partial(changed, change)
    for name, change in {
        "shared bias": tied,
        "weight of another parameter": made_of_another,
        "strided": replaced("trunk.layers.1.weight", nn.Parameter(torch.randn(9, 9).T)),
        "frozen": lambda agent: agent.trunk.layers[0].weight.requires_grad_(False),
        "wide head": replaced("head.last", nn.Linear(9, 5)),
        "another error": replaced("head.error", lambda value, target: (value - target) ** 4),
        "hook on a gradient": lambda agent: agent.head.last.bias.register_hook(nothing),
        "hook on the agent": lambda agent: agent.register_forward_hook(nothing),
        "hook on the head": lambda agent: agent.head.register_forward_pre_hook(nothing),
        "hook backwards": lambda agent: agent.trunk.register_full_backward_hook(nothing),
        "patched trunk": patched("trunk"),
        "patched passes of the trunk": patched("trunk", "last_steps"),
        "auxiliary loss of the trunk": lambda agent: setattr(agent.trunk, "auxiliary_loss", torch.ones(())),
        "patched passes": patched("", "last_steps"),
        "patched latents": patched("", "of_latent"),
        "patched normalisation": patched("", "_normalize"),
        "patched auxiliary loss": patched("", "auxiliary_loss"),
        "patched head": patched("head"),
        "patched values": patched("head", "values"),
        "patched loss": patched("head", "loss"),
    }.items()
}


@pytest.mark.parametrize("make_model", NOT_FUSED.values(), ids=NOT_FUSED)
def test_others_are_left_to_autograd(make_model: Callable[[], LitDQN]) -> None:
    model = make_model()
    assert model._fused_loss() is None


def test_autograd_hears_a_patched_loss() -> None:
    model = make(double=False)
    given, heard = lesson(model), []
    before = by_autograd(model, given)[0]

    def tripled(*told: Tensor) -> Tensor:
        heard.append(told)
        return 3 * ExpectedQ.loss(model.agent.head, *told)

    model.agent.head.loss = tripled
    after = by_autograd(model, given)[0]
    assert len(heard) == 1
    torch.testing.assert_close(after, 3 * before)


def test_the_same_without_change_is_fused() -> None:
    model = changed(nothing)
    assert isinstance(model._fused_loss(), FusedTDLoss)


def test_lessons_in_other_numbers_are_left_to_autograd() -> None:
    model = make(double=False)
    given = lesson(model)
    loss = fused_loss(model, given)
    assert not loss.takes(given._replace(reward=given.reward.double()))
    floats = ("reward", "discount", "weight", "target", "bootstrap")
    wide = {name: getattr(given, name).double() for name in floats}
    assert not loss.takes(given._replace(**wide))


def test_lessons_of_other_shapes_are_left_to_autograd() -> None:
    """Which broadcasts, or says what is wrong."""
    model = make(window=3, double=False)
    given = lesson(model)
    loss = fused_loss(model, given)
    assert not loss.takes(given._replace(weight=given.weight[:, :1]))
    assert not loss.takes(given._replace(action=given.action[:, :2]))


@pytest.mark.parametrize(
    ("window", "options", "is_fused"),
    [
        (12, {}, True),
        (13, {}, False),
        (3, {"n_step": 10}, True),
        (3, {"n_step": 11}, False),  # of which 3 + 11 - 1 steps judge
        (3, {"n_step": 11, "double": False}, True),
    ],
)
def test_large_batches_are_left_to_torch(window: int, options: dict[str, Any], is_fused: bool) -> None:
    """More than 2^24 multiplications a layer, with 20 windows of so many steps."""
    model = make(partial(MLP, d_model=256), window=window, **options)
    assert (model._fused_loss() is not None) is is_fused
