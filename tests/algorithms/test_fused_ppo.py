"""PPO's loss without autograd: its numbers are autograd's, it learns the same, and who it is not for."""

import pytest
import torch
from helpers import parameters, train, walk
from torch import Tensor, nn

from lit_rl import keys
from lit_rl.algorithms import LitPPO
from lit_rl.algorithms.fused_ppo import fused_ppo_loss
from lit_rl.envs import EnvConfig
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
@pytest.mark.parametrize("n_layers", [1, 3])
def test_numbers_are_those_of_autograd(n_layers, activation, normalized, value_clip, action) -> None:
    model = make(
        walk(action),
        trunk=lambda F: MLP(F, d_model=9, n_layers=n_layers, activation=activation),
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
    model, records = train(walk(action), "mlp", **options)
    assert model._fused_loss(4) is not None
    monkeypatch.setattr(LitPPO, "_fused_loss", lambda self, rows: None)
    other, others = train(walk(action), "mlp", **options)
    torch.testing.assert_close(parameters(model), parameters(other), atol=1e-4, rtol=1e-3)
    for key in ("policy_loss", "value_loss", "entropy", "grad_norm", "approx_kl", "clip_fraction"):
        assert records.series(f"train/{key}") == pytest.approx(others.series(f"train/{key}"), abs=2e-4), key


def shared_weight() -> LitPPO:
    model = make()
    model.agent.value_trunk.layers[0].weight = model.agent.trunk.layers[0].weight
    return model


def strided() -> LitPPO:
    model = make()
    model.agent.trunk.layers[1].weight = nn.Parameter(torch.randn(9, 9).T)
    return model


def changed(change, env: EnvConfig | None = None) -> LitPPO:
    model = make(env)
    change(model.agent)
    return model


class OwnLoss(LitPPO):
    def _loss(self, *args):
        return super()._loss(*args)


NOT_FUSED = {
    "multidiscrete": lambda: make(walk("multidiscrete")),
    "squashed": lambda: make(walk("continuous"), squash=True),
    "recurrent": lambda: make(trunk=lambda F: GRU(F, d_model=9)),
    "compiled loss": lambda: make(compile_loss=True),
    "its own loss": lambda: OwnLoss(walk(), MLP, value_trunk="separate"),
    "shared weight": shared_weight,
    "strided": strided,
    "frozen": lambda: changed(lambda agent: agent.trunk.layers[0].weight.requires_grad_(False)),
    "frozen standard deviation": lambda: changed(
        lambda agent: agent.policy.log_std.requires_grad_(False), walk("continuous")
    ),
    "hook on a gradient": lambda: changed(lambda agent: agent.value_head.bias.register_hook(lambda g: g)),
    "hook after a gradient": lambda: changed(
        lambda agent: agent.value_head.bias.register_post_accumulate_grad_hook(lambda p: None)
    ),
    "hook on the agent": lambda: changed(lambda agent: agent.register_forward_hook(lambda *_: None)),
    "hook backwards": lambda: changed(lambda agent: agent.trunk.register_full_backward_hook(lambda *_: None)),
}


@pytest.mark.parametrize("model", NOT_FUSED.values(), ids=NOT_FUSED)
def test_others_are_left_to_autograd(model) -> None:
    assert model()._fused_loss(M * T) is None


def test_large_minibatches_are_left_to_torch() -> None:
    agent = make(trunk=lambda F: MLP(F, d_model=512)).agent
    assert fused_ppo_loss(agent, 64, value_clip=None, value_coef=0.5) is not None
    assert fused_ppo_loss(agent, 65, value_clip=None, value_coef=0.5) is None
