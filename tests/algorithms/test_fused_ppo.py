"""PPO's loss without autograd: its numbers are autograd's, it learns the same, and who it is not for."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gymnasium import spaces
from helpers import made_of_another, nothing, parameters, patched, replaced, train, walk
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lit_rl import keys
from lit_rl.algorithms import LitPPO, ppo
from lit_rl.algorithms.fused_ppo import FusedPPOLoss, fused_ppo_loss
from lit_rl.envs import EnvConfig
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.trunks import GRU, MLP

M, T = 40, 2  # minibatch


def make(env: EnvConfig | None = None, trunk=lambda F: MLP(F, d_model=9), **options) -> LitPPO:
    """Whose weights are all clearly not zero."""
    torch.manual_seed(0)
    model = LitPPO(env or walk(), trunk, value_trunk="separate", **options)
    with torch.no_grad():
        for parameter in model.agent.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


def minibatch(action: str = "discrete") -> dict[str, Tensor]:
    """Some ratios lie beyond the clip, some values beyond theirs."""
    torch.manual_seed(1)
    return {
        keys.OBSERVATION: torch.randn(M, T, 2),
        keys.ACTION: torch.randint(3, (M, T)) if action == "discrete" else torch.randn(M, T, 2),
        keys.LOG_PROB: -torch.rand(M, T) - 0.6,
        keys.VALUE: torch.randn(M, T),
        keys.IS_INIT: torch.zeros(M, T, dtype=torch.bool),
        keys.ADVANTAGE: torch.randn(M, T),
        keys.VALUE_TARGET: torch.randn(M, T),
    }


def told(loss: Tensor, measured: dict[str, Tensor], log_ratio: Tensor, model: LitPPO) -> list[Tensor]:
    assert list(measured) == ["policy_loss", "value_loss", "entropy"]
    grads = [parameter.grad for parameter in model.agent.parameters()]
    assert all(grad is not None and grad.abs().max() > 1e-3 for grad in grads)
    return [loss.detach(), *measured.values(), log_ratio, *grads]


def by_autograd(model: LitPPO, steps: dict[str, Tensor], clip=0.2, entropy_coef=0.03) -> list[Tensor]:
    model.agent.zero_grad()
    result = model._loss(steps, model.agent.initial_state(M), clip, entropy_coef)
    result[0].backward()
    return told(*result, model)


def without(model: LitPPO, steps: dict[str, Tensor], clip=0.2, entropy_coef=0.03) -> list[Tensor]:
    model.agent.zero_grad()
    loss = model._fused_loss(M * T)
    assert loss is not None
    return told(*loss(steps, clip, entropy_coef), model)


@pytest.mark.parametrize("action", ["discrete", "continuous"])
@pytest.mark.parametrize("value_clip", [None, 0.3])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(("n_layers", "encoder_width"), [(1, None), (3, None), (2, 7)])
def test_numbers_are_those_of_autograd(
    n_layers, encoder_width, activation, normalized, value_clip, action
) -> None:
    model = make(
        walk(action),
        trunk=lambda F: MLP(F, d_model=9, n_layers=n_layers, activation=activation),
        encoder_width=encoder_width,
        normalize_observation=normalized,
        value_clip=value_clip,
        value_coef=0.7,
    )
    model.agent.update_normalization(3 * torch.randn(50, 1, 2) + 2)
    steps = minibatch(action)
    for clip, entropy_coef in ((0.2, 0.03), (0.05, 0.0)):
        expected = by_autograd(model, steps, clip, entropy_coef)
        torch.testing.assert_close(without(model, steps, clip, entropy_coef), expected, atol=4e-6, rtol=1e-5)
    assert not torch.equal(expected[0], by_autograd(model, steps, 0.2, 0.5)[0])  # coefficients do count


@pytest.mark.parametrize("action", ["discrete", "continuous"])
def test_weights_that_moved_are_seen(action: str) -> None:
    model, steps = make(walk(action)), minibatch(action)
    loss = model._fused_loss(M * T)
    assert loss is not None
    before = loss(steps, 0.2, 0.03)[0].item()
    with torch.no_grad():
        for parameter in model.agent.parameters():
            parameter.mul_(1.1)
    now = loss(steps, 0.2, 0.03)[0]
    assert abs(now.item() - before) > 1e-3
    torch.testing.assert_close(now, by_autograd(model, steps)[0])


@pytest.mark.parametrize("action", ["discrete", "continuous"])
@pytest.mark.parametrize(
    "options", [{}, {"normalize_observation": True, "value_clip": 0.2, "target_kl": 0.1}]
)
def test_training_is_the_same(monkeypatch: pytest.MonkeyPatch, options, action: str) -> None:
    """Over rollouts, epochs and Adam's steps, to what rounding makes of it."""
    options = {"rollouts": 4, "value_trunk": "separate", "num_epochs": 3, "lr": 1e-3} | options
    asked: list[int] = []
    updates: list[int] = []
    find, call = ppo.fused_ppo_loss, FusedPPOLoss.__call__

    def asking(agent: ActorCritic, rows: int, **options):
        asked.append(rows)
        return find(agent, rows, **options)

    def counting(self, steps_MT, *args):
        updates.append(steps_MT[keys.ACTION].shape[:2].numel())
        return call(self, steps_MT, *args)

    monkeypatch.setattr(ppo, "fused_ppo_loss", asking)
    monkeypatch.setattr(FusedPPOLoss, "__call__", counting)
    model, records = train(walk(action), "mlp", **options)
    assert len(asked) == 4
    assert set(asked) == set(updates)
    assert "target_kl" in options or len(updates) == 4 * 3 * model.num_minibatches
    monkeypatch.setattr(LitPPO, "_fused_loss", lambda self, rows: None)
    other, others = train(walk(action), "mlp", **options)
    torch.testing.assert_close(parameters(model), parameters(other), atol=1e-4, rtol=1e-3)
    for key in ("policy_loss", "value_loss", "entropy", "grad_norm", "approx_kl", "clip_fraction"):
        assert records.series(f"train/{key}") == pytest.approx(others.series(f"train/{key}"), abs=2e-4), key


def changed(change: Callable[[ActorCritic], Any], action: str = "continuous") -> LitPPO:
    model = make(walk(action))
    change(model.agent)
    return model


def tied(agent: ActorCritic) -> None:
    agent.value_trunk.layers[0].weight = agent.trunk.layers[0].weight


def tied_deviation(agent: ActorCritic) -> None:
    agent.policy.log_std = agent.policy.mean.bias


class OwnLoss(LitPPO):
    def _loss(self, *args):
        return super()._loss(*args)


class Wrapped(LitPPO):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        loss = self._minibatch_loss
        self._minibatch_loss = lambda *args: loss(*args)


NOT_FUSED = {
    "multidiscrete": lambda: make(walk("multidiscrete")),
    "squashed": lambda: make(walk("continuous"), squash=True),
    "recurrent": lambda: make(trunk=lambda F: GRU(F, d_model=9)),
    "compiled loss": lambda: make(compile_loss=True),
    "its own loss": lambda: OwnLoss(walk(), MLP, value_trunk="separate"),
    "a loss wrapped": lambda: Wrapped(walk(), MLP, value_trunk="separate"),
} | {
    name: partial(changed, change)
    for name, change in {
        "shared weight": tied,
        "shared standard deviation": tied_deviation,
        "weight of another parameter": made_of_another,
        "strided": replaced("trunk.layers.1.weight", nn.Parameter(torch.randn(9, 9).T)),
        "frozen": lambda agent: agent.trunk.layers[0].weight.requires_grad_(False),
        "frozen standard deviation": lambda agent: agent.policy.log_std.requires_grad_(False),
        "one standard deviation": replaced("policy.log_std", nn.Parameter(torch.zeros(1))),
        "standard deviation in float64": replaced("policy.log_std", nn.Parameter(torch.zeros(2).double())),
        "wide mean": replaced("policy.mean", nn.Linear(9, 5)),
        "wide value": replaced("value_head", nn.Linear(9, 2)),
        "hook on a gradient": lambda agent: agent.value_head.bias.register_hook(nothing),
        "hook after a gradient": lambda agent: agent.value_head.bias.register_post_accumulate_grad_hook(
            nothing
        ),
        "hook on the agent": lambda agent: agent.register_forward_hook(nothing),
        "hook before the agent": lambda agent: agent.register_forward_pre_hook(nothing),
        "hook backwards": lambda agent: agent.trunk.register_full_backward_hook(nothing),
        "hook before backwards": lambda agent: agent.trunk.register_full_backward_pre_hook(nothing),
        "patched agent": patched(""),
        "patched trunk": patched("trunk"),
        "patched policy": patched("policy", "log_prob_and_entropy"),
    }.items()
}


@pytest.mark.parametrize("model", NOT_FUSED.values(), ids=NOT_FUSED)
def test_others_are_left_to_autograd(model) -> None:
    assert model()._fused_loss(M * T) is None


def test_the_same_without_change_is_fused() -> None:
    assert changed(nothing)._fused_loss(M * T) is not None


def test_watched_by_torch_they_are_left_to_autograd() -> None:
    model = make()
    with torch.autograd.set_detect_anomaly(True):
        assert model._fused_loss(M * T) is None
    handle = register_module_forward_hook(nothing)
    try:
        assert model._fused_loss(M * T) is None
    finally:
        handle.remove()
    assert model._fused_loss(M * T) is not None


class Replacing(torch.optim.SGD):
    """Puts new tensors in the place of weights."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - 0.1 * parameter.grad


class OwnOptimizer(LitPPO):
    def configure_optimizers(self):
        return Replacing([{"params": list(self.agent.parameters())}, {"params": []}], lr=1.0)


def test_an_optimizer_of_ones_own_is_left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedPPOLoss, "__call__", None)
    _, records = train(walk(), "mlp", rollouts=2, value_trunk="separate", algorithm=OwnOptimizer)
    assert min(records.series("train/approx_kl")) > 1e-6


@pytest.mark.parametrize(("features", "width"), [(2, 512), (4096, 64)])
def test_large_minibatches_are_left_to_torch(features: int, width: int) -> None:
    """By the wider side of a layer."""
    box = spaces.Box(-1, 1, (features,))
    env: Any = SimpleNamespace(id="wide", spaces=lambda: (box, spaces.Discrete(3)))
    agent = LitPPO(env, lambda F: MLP(F, d_model=width), value_trunk="separate").agent
    assert fused_ppo_loss(agent, 64, value_clip=None, value_coef=0.5) is not None
    assert fused_ppo_loss(agent, 65, value_clip=None, value_coef=0.5) is None


def test_no_gradient_of_a_ratio_is_none_of_a_deviation_however_far_out() -> None:
    """Clipped away where z^2 is infinite; autograd's numbers, to rounding."""
    model, steps = make(walk("continuous")), minibatch("continuous")
    steps[keys.ACTION][0, 0, 0] = 3e19
    steps[keys.LOG_PROB][0, 0] = 0.0
    expected = by_autograd(model, steps)
    assert all(value.isfinite().all() for value in expected[5:])
    torch.testing.assert_close(without(model, steps), expected, atol=4e-6, rtol=1e-5)
