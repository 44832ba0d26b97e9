"""Perceptrons as one call against the same networks in torch: numbers, who may be fused, whose weights."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import Q_HEADS, nothing, patched
from torch import nn

from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.fused import fused, fused_q
from lit_rl.models.q_heads import ExpectedQ
from lit_rl.models.q_network import QNetwork
from lit_rl.trunks import GRU, MLP

BOX = spaces.Box(-1, 1, (3,))
ACTIONS = {
    "discrete": spaces.Discrete(3, start=1),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "continuous": spaces.Box(-2, 2, (2,)),
}


def make(
    observation=BOX, action=ACTIONS["discrete"], trunk=MLP, trunk_options=None, **options
) -> ActorCritic:
    torch.manual_seed(0)
    options = {"value_trunk": "separate"} | options
    agent = ActorCritic(
        observation, action, lambda F: trunk(F, **(trunk_options or {"d_model": 8})), **options
    )
    with torch.no_grad():
        for parameter in agent.parameters():  # biases and heads too are clearly not zero
            parameter.copy_(torch.randn(parameter.shape) * 0.6)
    return agent


def in_torch(agent: ActorCritic, observation: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.from_numpy(observation).unsqueeze(1)
    with torch.no_grad():
        params, value, _ = agent(x, agent.initial_state(len(x)), torch.zeros(len(x), 1, dtype=torch.bool))
    return params[:, 0], value


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize("encoder_width", [None, 6])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_policy_and_value_are_those_of_torch(
    rows, encoder_width, n_layers, activation, action, normalized
) -> None:
    shape = {"d_model": 19, "n_layers": n_layers, "activation": activation}
    options = {"encoder_width": encoder_width, "normalize_observation": normalized}
    agent = make(action=action, trunk_options=shape, **options)
    agent.update_normalization(3 * torch.randn(50, 1, 3) + 2)
    observation = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    networks = fused(agent)
    assert networks is not None
    params, value = in_torch(agent, observation)
    torch.testing.assert_close(networks.policy(observation), params, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(networks.value(observation), value, atol=2e-5, rtol=1e-5)


def test_by_hand() -> None:
    """relu(2 x1 - x3 + 0.5), relu(x2 - 1); logits 1 h1 - h2, 3 h2 + 2; value h1 + 10 of the same layer."""
    agent = make(action=spaces.Discrete(2), trunk_options={"d_model": 2, "n_layers": 1, "activation": "relu"})
    with torch.no_grad():
        for trunk in agent.trunks():
            trunk.layers[0].weight.copy_(torch.tensor([[2.0, 0, -1], [0, 1, 0]]))
            trunk.layers[0].bias.copy_(torch.tensor([0.5, -1]))
        agent.policy.logits.weight.copy_(torch.tensor([[1.0, -1], [0, 3]]))
        agent.policy.logits.bias.copy_(torch.tensor([0.0, 2]))
        agent.value_head.weight.copy_(torch.tensor([[1.0, 0]]))
        agent.value_head.bias.fill_(10)
    networks = fused(agent)
    assert networks is not None
    x = np.array([[1, 3, 0.5], [0, 0, 4]], np.float32)  # hidden: 2, 2 and 0, 0
    assert networks.policy(x).tolist() == [[0, 8], [0, 2]]
    assert networks.value(x).tolist() == [[12], [10]]


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_observations_of_other_numbers(dtype: type) -> None:
    agent = make(spaces.Box(-9, 9, (3,), dtype))
    networks = fused(agent)
    assert networks is not None
    observation = np.arange(-6, 6).reshape(4, 3).astype(dtype)
    torch.testing.assert_close(networks.policy(observation), in_torch(agent, observation)[0])


def hooked() -> ActorCritic:
    agent = make()
    agent.trunk.layers[0].register_forward_hook(lambda *_: None)
    return agent


def patched_policy() -> ActorCritic:
    agent = make()
    patched("", "act")(agent)
    return agent


def half_swapped() -> ActorCritic:
    agent = make()
    agent.value_head = nn.Sequential(agent.value_head)
    return agent


def hooked_policy() -> ActorCritic:
    agent = make()
    agent.policy.register_forward_hook(lambda *_: None)
    return agent


def other_encoder() -> ActorCritic:
    agent = make(encoder_width=4)
    agent.encoder.project[1] = nn.Tanh()
    return agent


def without_bias() -> ActorCritic:
    agent = make()
    agent.value_head = nn.Linear(8, 1, bias=False)
    return agent


def other_widths() -> ActorCritic:
    agent = make()
    agent.trunk.layers[1] = nn.Linear(30, 8)
    return agent


class Doubled(MLP):
    def forward(self, x, state, is_init):
        y, state = super().forward(x, state, is_init)
        return 2 * y, state


OTHERS = {
    "shared": lambda: make(value_trunk="shared"),
    "recurrent": lambda: make(trunk=GRU),
    "subclass": lambda: make(trunk=Doubled),
    "silu": lambda: make(trunk_options={"activation": "silu"}),
    "encoder": other_encoder,
    "matrix": lambda: make(spaces.Box(-1, 1, (3, 2))),
    "dict": lambda: make(spaces.Dict({"a": BOX})),
    "one-hot": lambda: make(spaces.Discrete(3)),
    "float64": lambda: make().double(),
    "hook": hooked,
    "hooked policy": hooked_policy,
    "patched action": patched_policy,
    "head": half_swapped,
    "no bias": without_bias,
    "widths": other_widths,
}


@pytest.mark.parametrize("agent", OTHERS.values(), ids=OTHERS)
def test_others_are_left_to_torch(agent) -> None:
    assert fused(agent()) is None


def test_layers_that_are_quicker_in_torch_are_left_to_it() -> None:
    """From 2**24 multiplications of a layer on."""
    agent, q = make(trunk_options={"d_model": 512}), q_network(d_model=512)
    assert fused(agent, 64) is not None
    assert fused(agent, 65) is None
    assert fused_q(q, 64) is not None
    assert fused_q(q, 65) is None


@pytest.mark.parametrize("width", [2, 9])
def test_observations_of_another_shape_are_told(width: int) -> None:
    networks = fused(make())
    assert networks is not None
    with pytest.raises(UserError, match=rf"shape \({width},\) where its space says \(3,\)"):
        networks.policy(np.zeros((4, width), np.float32))


def test_autocast_is_left_to_torch() -> None:
    agent = make()
    assert fused(agent) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(agent) is None


def test_weights_are_those_of_its_making_or_later() -> None:
    """An optimizer changes weights in place; who replaces them makes another one."""
    agent, x = make(), np.ones((2, 3), np.float32)
    before = fused(agent)
    assert before is not None
    was = before.policy(x)
    with torch.no_grad():
        agent.trunk.layers[0].weight.add_(1)
    now, _ = in_torch(agent, x)
    torch.testing.assert_close(before.policy(x), now)
    assert (now - was).abs().max() > 1e-2
    agent.trunk.layers[0].weight = nn.Parameter(torch.zeros(8, 3))
    after = fused(agent)
    assert after is not None
    torch.testing.assert_close(after.policy(x), in_torch(agent, x)[0])
    assert (after.policy(x) - now).abs().max() > 1e-2


# ------------------------------------------------------------------ action values


def q_network(trunk=MLP, head=ExpectedQ, activation="relu", d_model=8, **options) -> QNetwork:
    torch.manual_seed(0)
    options = {"encoder_width": 6, "normalize_observation": True} | options
    sizes = {"d_model": d_model} | (
        {"n_layers": 2, "activation": activation} if issubclass(trunk, MLP) else {}
    )
    agent = QNetwork(BOX, ACTIONS["discrete"], lambda F: trunk(F, **sizes), head, **options)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.6)
    agent.update_normalization(3 * torch.randn(50, 1, 3) + 2)
    return agent


@pytest.mark.parametrize("options", [{}, {"encoder_width": None}, {"normalize_observation": False}], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_latents_and_action_values_are_those_of_torch(rows, activation, options) -> None:
    agent = q_network(activation=activation, **options)
    network = fused_q(agent)
    assert network is not None
    observation = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    x, is_init = torch.from_numpy(observation).unsqueeze(1), torch.zeros(rows, 1, dtype=torch.bool)
    with torch.no_grad():
        values, latent, _ = agent(x, agent.initial_state(rows), is_init)
    torch.testing.assert_close(network(observation), (latent[:, 0], values[:, 0, :, 0]), atol=2e-5, rtol=1e-5)
    assert values.std() > 0.1


def test_action_values_by_hand() -> None:
    """relu(2 x1 - x3 + 0.5), relu(x2 - 1); values 1 h1 - h2, 3 h2 + 2."""
    agent = QNetwork(
        BOX, spaces.Discrete(2), lambda F: MLP(F, d_model=2, n_layers=1, activation="relu"), ExpectedQ
    )
    with torch.no_grad():
        agent.trunk.layers[0].weight.copy_(torch.tensor([[2.0, 0, -1], [0, 1, 0]]))
        agent.trunk.layers[0].bias.copy_(torch.tensor([0.5, -1]))
        agent.head.last.weight.copy_(torch.tensor([[1.0, -1], [0, 3]]))
        agent.head.last.bias.copy_(torch.tensor([0.0, 2]))
    network = fused_q(agent)
    assert network is not None
    latent, values = network(np.array([[1, 3, 0.5], [0, 0, 4]], np.float32))
    assert latent.tolist() == [[2, 2], [0, 0]]
    assert values.tolist() == [[0, 8], [0, 2]]


def patched_act(name: str) -> QNetwork:
    agent = q_network()
    patched("", name)(agent)
    return agent


def hooked_head() -> QNetwork:
    agent = q_network()
    agent.head.register_forward_hook(nothing)
    return agent


OTHER_Q: dict[str, Callable[[], QNetwork]] = {
    "recurrent": lambda: q_network(GRU),
    "subclass": lambda: q_network(Doubled),
    "silu": lambda: q_network(activation="silu"),
    "float64": lambda: q_network().double(),
    "dueling": lambda: q_network(head=partial(ExpectedQ, dueling=True)),
    "hidden layer": lambda: q_network(head=partial(ExpectedQ, hidden=5)),
    "categorical": lambda: q_network(head=Q_HEADS["categorical"]),
    "hook on the head": hooked_head,
    "patched action": lambda: patched_act("act"),
    "patched latents": lambda: patched_act("latent"),
}


@pytest.mark.parametrize("agent", OTHER_Q.values(), ids=OTHER_Q)
def test_other_q_networks_are_left_to_torch(agent) -> None:
    assert fused_q(agent()) is None
