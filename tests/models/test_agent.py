"""The agent: acting is one step of learning's pass; shared and separate value trunks."""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import installed_trunks, sample, small
from tensordict import TensorDict
from torch import Tensor

from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.trunks import GRU, MLP

OBSERVATION = spaces.Box(-1, 1, (3,))
DICT = spaces.Dict({"symbol": spaces.Discrete(4), "place": OBSERVATION})
DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-2, 2, (2,))


def make(observation=OBSERVATION, action=DISCRETE, trunk: str = "gru", **options) -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(observation, action, small(trunk), **options)


def at(observation, t: int):
    return (
        {k: v[:, t] for k, v in observation.items()} if isinstance(observation, dict) else observation[:, t]
    )


@pytest.mark.parametrize("value_trunk", ["shared", "separate"])
@pytest.mark.parametrize("observation", [OBSERVATION, DICT], ids=["box", "dict"])
@pytest.mark.parametrize("trunk", installed_trunks())
def test_acting_is_one_step_of_forward(trunk: str, observation: spaces.Space, value_trunk: str) -> None:
    """T steps of `act` (and `value`) equal one pass over T, with resets on the way."""
    agent = make(observation, BOX, trunk, value_trunk=value_trunk, encoder_width=6)
    N, T = 4, 7
    x, is_init = sample(observation, N, T), torch.rand(N, T) < 0.3
    state = agent.initial_state(N)
    params, values, last = agent(x, state, is_init)
    for t in range(T):
        value = agent.value(at(x, t), state, is_init[:, t])
        step = agent.act(at(x, t), state, is_init[:, t])
        torch.testing.assert_close(step.value, values[:, t], atol=1e-5, rtol=0)
        torch.testing.assert_close(value, values[:, t], atol=1e-5, rtol=0)
        log_prob = agent.policy.log_prob(params[:, t], step.action)
        torch.testing.assert_close(
            agent.policy.log_prob(step.params, step.action), log_prob, atol=1e-5, rtol=0
        )
        greedy = agent.act(at(x, t), state, is_init[:, t], greedy=True)
        torch.testing.assert_close(greedy.action, agent.policy.mode(params[:, t]), atol=1e-5, rtol=0)
        state = step.state
    assert state.batch_size == last.batch_size == torch.Size([N])
    torch.testing.assert_close(state.to_dict(), last.to_dict(), atol=1e-5, rtol=0)


def test_acting_leaves_no_graph_and_changes_nothing() -> None:
    agent = make()
    state = agent.initial_state(2)
    kept = state.clone()
    step = agent.act(torch.ones(2, 3), state, torch.zeros(2, dtype=torch.bool))
    assert not any(t.requires_grad for t in (step.action, step.params, step.value, *step.state.values()))
    assert (state == kept).all()
    assert not (step.state == state).all()


def test_the_generator_decides_the_action() -> None:
    agent = make()
    x, state, no = torch.randn(64, 3), agent.initial_state(64), torch.zeros(64, dtype=torch.bool)

    def actions(seed: int) -> Tensor:
        return agent.act(x, state, no, generator=torch.Generator().manual_seed(seed)).action

    assert torch.equal(actions(0), actions(0))
    assert not torch.equal(actions(0), actions(1))


def gradients_of(agent: ActorCritic, what: str) -> dict[str, bool]:
    """Which submodules the policy, or the value, sends a gradient to."""
    agent.zero_grad()
    params, values, _ = agent(
        torch.randn(2, 3, 3), agent.initial_state(2), torch.zeros(2, 3, dtype=torch.bool)
    )
    (params if what == "policy" else values).square().sum().backward()
    return {
        name: any(p.grad is not None and p.grad.any() for p in module.parameters())
        for name, module in agent.named_children()
        if any(True for _ in module.parameters())
    }


def test_a_shared_trunk_learns_from_both() -> None:
    agent = make(encoder_width=6)
    assert len(list(agent.trunks())) == 1
    body = {"encoder": True, "trunk": True}
    assert gradients_of(agent, "policy") == body | {"policy": True, "value_head": False}
    assert gradients_of(agent, "value") == body | {"policy": False, "value_head": True}


def test_separate_trunks_learn_apart() -> None:
    agent = make(value_trunk="separate", encoder_width=6)
    first, second = agent.trunks()
    assert not torch.equal(next(first.parameters()), next(second.parameters()))
    policy = dict.fromkeys(("encoder", "trunk", "policy"), True)
    value = dict.fromkeys(("value_encoder", "value_trunk", "value_head"), True)
    assert gradients_of(agent, "policy") == policy | dict.fromkeys(value, False)
    assert gradients_of(agent, "value") == dict.fromkeys(policy, False) | value
    assert set(agent.initial_state(2).keys()) == {"policy", "value"}


def test_separate_memories_do_not_mix() -> None:
    agent = make(value_trunk="separate")
    state = agent.initial_state(2)
    no = torch.zeros(2, 1, dtype=torch.bool)
    x = torch.randn(2, 1, 3)
    params, values, _ = agent(x, state, no)
    moved = state.clone()
    moved["value"] = moved["value"].apply(torch.ones_like)
    params_moved, values_moved, _ = agent(x, moved, no)
    assert torch.equal(params, params_moved)
    assert not torch.allclose(values, values_moved)


def test_is_memoryless() -> None:
    for value_trunk in ("shared", "separate"):
        assert make(trunk="mlp", value_trunk=value_trunk).is_memoryless
        assert not make(trunk="gru", value_trunk=value_trunk).is_memoryless
        assert make(trunk="mlp", value_trunk=value_trunk).initial_state(5).batch_size == torch.Size([5])


class Balanced(MLP):
    """A trunk that asks for something beside the algorithm's loss."""

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        y, state = super().forward(x, state, is_init)
        self.auxiliary_loss = y.square().mean()
        return y, state


def test_auxiliary_losses_are_summed() -> None:
    assert make().auxiliary_loss() is None
    agent = ActorCritic(OBSERVATION, DISCRETE, Balanced, value_trunk="separate")
    agent(torch.randn(2, 3, 3), agent.initial_state(2), torch.zeros(2, 3, dtype=torch.bool))
    total = agent.auxiliary_loss()
    assert total.item() == pytest.approx(sum(trunk.auxiliary_loss.item() for trunk in agent.trunks()))
    assert copy.deepcopy(agent).auxiliary_loss() is None  # its graph cannot be copied
    assert total > 0
    total.backward()
    assert all(p.grad.any() for trunk in agent.trunks() for name, p in trunk.named_parameters())


def test_heads_stay_in_float32_under_autocast() -> None:
    agent = make(encoder_width=6)
    no = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.randn(2, 3, 3)
    exact, _, _ = agent(x, agent.initial_state(2), no)
    with torch.autocast("cpu", torch.bfloat16):
        params, values, _ = agent(x, agent.initial_state(2), no)
    assert params.dtype == values.dtype == torch.float32
    assert not torch.equal(params, exact)  # the encoder did run in bfloat16
    torch.testing.assert_close(params, exact, atol=0.05, rtol=0)


def test_actions_reach_the_environment_in_its_units() -> None:
    agent = make(action=spaces.Box(np.array([0.0], np.float32), np.array([4.0], np.float32)), squash=True)
    assert agent.to_env(torch.tensor([[0.0]])).tolist() == [[2.0]]
    assert make(action=spaces.Discrete(2, start=3)).to_env(torch.tensor([0, 1])).tolist() == [3, 4]


def test_a_value_trunk_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="value_trunk is 'seperate': choose shared or separate"):
        make(value_trunk="seperate")


def test_a_trunk_class_is_a_factory() -> None:
    agent = ActorCritic(OBSERVATION, DISCRETE, GRU)
    assert agent.trunk.in_features == 3
