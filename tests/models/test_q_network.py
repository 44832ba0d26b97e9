"""The Q-network: acting is one step of learning's pass; how often it takes which action."""

import copy
import math

import pytest
import torch
from gymnasium import spaces
from helpers import installed_trunks, sample, small
from torch import Tensor

from lit_rl.errors import UserError
from lit_rl.models.q_heads import CategoricalQ, ExpectedQ, QuantileQ
from lit_rl.models.q_network import QNetwork, gumbel
from lit_rl.models.windowed import Windowed

torch.set_num_threads(1)

OBSERVATION = spaces.Box(-1, 1, (3,))
DICT = spaces.Dict({"symbol": spaces.Discrete(4), "place": OBSERVATION})
HEADS = {
    "expected": ExpectedQ,
    "categorical": lambda *sizes: CategoricalQ(*sizes, v_min=-3.0, v_max=3.0, atoms=7),
    "quantile": lambda *sizes: QuantileQ(*sizes, quantiles=5),
}


def make(
    observation=OBSERVATION, trunk: str = "gru", head=ExpectedQ, actions: int = 4, **options
) -> QNetwork:
    torch.manual_seed(0)
    return QNetwork(observation, spaces.Discrete(actions), small(trunk), head, **options)


def at(observation, t: int):
    return (
        {k: v[:, t] for k, v in observation.items()} if isinstance(observation, dict) else observation[:, t]
    )


# ------------------------------------------------------------------ acting and learning


@pytest.mark.parametrize("observation", [OBSERVATION, DICT], ids=["box", "dict"])
@pytest.mark.parametrize("trunk", installed_trunks())
def test_acting_is_one_step_of_forward(trunk: str, observation: spaces.Space) -> None:
    agent = make(observation, trunk, encoder_width=6)
    N, T = 4, 7
    x, is_init = sample(observation, N, T), torch.rand(N, T) < 0.3
    state = agent.initial_state(N)
    out, latents, last = agent(x, state, is_init)
    values = agent.head.values(out)
    assert values.shape == (N, T, 4)
    for t in range(T):
        step = agent.act(at(x, t), state, is_init[:, t], greedy=True)
        torch.testing.assert_close(step.latent, latents[:, t], atol=1e-5, rtol=0)
        assert torch.equal(step.action, values[:, t].argmax(-1))
        latent, after = agent.latent(at(x, t), state, is_init[:, t])
        assert torch.equal(latent, step.latent)
        torch.testing.assert_close(after.to_dict(), step.state.to_dict())
        state = step.state
    torch.testing.assert_close(state.to_dict(), last.to_dict(), atol=1e-5, rtol=0)


def test_acting_on_a_window_forgets_what_is_older() -> None:
    agent, T = make(trunk="lstm", acting_window=3), 6
    x, no = sample(OBSERVATION, 2, T), torch.zeros(2, T, dtype=torch.bool)
    first = no.clone()
    first[:, 0] = True

    def latent(x: Tensor) -> Tensor:
        state = agent.initial_state(2)
        for t in range(T):
            _, latent, state = agent.act(x[:, t], state, first[:, t], greedy=True)
        return latent

    _, alone, _ = agent(x[:, -3:], agent.trunk.initial_state(2), no[:, -3:])
    torch.testing.assert_close(latent(x), alone[:, -1], atol=1e-6, rtol=0)
    _, carried, _ = agent(x, agent.trunk.initial_state(2), no)
    assert not torch.allclose(latent(x), carried[:, -1], atol=1e-4)


def test_windows_are_for_trunks_with_memory() -> None:
    assert make(trunk="mlp", acting_window=3).windowed is None
    assert make(trunk="gru").windowed is None
    assert isinstance(make(trunk="gru", acting_window=1).windowed, Windowed)


def test_a_copy_acts_with_its_own_trunk() -> None:
    agent = make(trunk="lstm", acting_window=3)
    twin = copy.deepcopy(agent)
    assert twin.windowed._trunk[0] is twin.trunk is not agent.trunk
    x, yes = sample(OBSERVATION, 2), torch.ones(2, dtype=torch.bool)
    before = agent.act(x, agent.initial_state(2), yes, greedy=True).latent
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(agent.act(x, agent.initial_state(2), yes, greedy=True).latent, before)
    assert not torch.allclose(twin.act(x, twin.initial_state(2), yes, greedy=True).latent, before)


def test_acting_leaves_no_graph_and_changes_nothing() -> None:
    agent = make()
    state = agent.initial_state(2)
    kept = state.clone()
    step = agent.act(torch.ones(2, 3), state, torch.zeros(2, dtype=torch.bool))
    assert not any(t.requires_grad for t in (step.action, step.latent, *step.state.values()))
    assert (state == kept).all()
    assert not (step.state == state).all()


def test_heads_stay_in_float32_under_autocast() -> None:
    agent = make(encoder_width=6)
    x, no = torch.randn(2, 3, 3), torch.zeros(2, 3, dtype=torch.bool)
    exact, _, _ = agent(x, agent.initial_state(2), no)
    with torch.autocast("cpu", torch.bfloat16):
        out, latent, _ = agent(x, agent.initial_state(2), no)
        assert torch.equal(agent.of_latent(latent), out)
    assert out.dtype == torch.float32
    assert torch.equal(agent.head(latent.float()), out)
    assert not torch.equal(out, exact)  # the encoder did run in bfloat16


def test_actions_are_counted_from_the_spaces_start() -> None:
    agent = QNetwork(OBSERVATION, spaces.Discrete(2, start=3), small("mlp"), ExpectedQ)
    assert agent.to_env(torch.tensor([0, 1])).tolist() == [3, 4]
    assert make().to_env(torch.tensor([0, 1])).tolist() == [0, 1]


def test_other_actions_are_refused() -> None:
    with pytest.raises(UserError, match=r"discrete actions.*LitPPO"):
        QNetwork(OBSERVATION, OBSERVATION, small("mlp"), ExpectedQ)


# ------------------------------------------------------------------ exploration

VALUES = torch.tensor([0.5, -0.2, 0.9, 0.1])
DRAWS = 40_000


def frequencies(agent: QNetwork, values: Tensor = VALUES, seed: int = 0) -> Tensor:
    noise = agent.noise(DRAWS, generator=torch.Generator().manual_seed(seed))
    action = (values + noise).argmax(-1)
    return torch.bincount(action, minlength=len(values)).double() / DRAWS


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return (DRAWS * (observed - expected).square() / expected).sum().item()


IMPROBABLE = 21.1  # chi-square of 3 degrees of freedom: beyond it lies 1 case in 10,000


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_epsilon_greedy_is_random_so_often(rate: float) -> None:
    agent = make()
    agent.exploration_rate = rate
    expected = torch.full((4,), rate / 4, dtype=torch.float64)
    expected[2] += 1 - rate
    found = frequencies(agent)
    assert chi_square(found, expected) < IMPROBABLE
    expected[2] -= 0.02
    expected[0] += 0.02
    assert chi_square(found, expected) > IMPROBABLE


@pytest.mark.parametrize(("temperature", "values"), [(0.2, VALUES), (1.0, VALUES), (5.0, 5 * VALUES)])
def test_softmax_is_that_of_values_over_the_temperature(temperature: float, values: Tensor) -> None:
    agent = make(exploration="softmax")
    agent.exploration_rate = temperature
    found = frequencies(agent, values)
    assert chi_square(found, (values.double() / temperature).softmax(-1)) < IMPROBABLE
    assert chi_square(found, (values.double() / (1.2 * temperature)).softmax(-1)) > IMPROBABLE


@pytest.mark.parametrize("exploration", ["epsilon_greedy", "softmax"])
def test_without_exploration_the_best_is_taken(exploration) -> None:
    agent = make(exploration=exploration)
    agent.exploration_rate = 0.0
    assert frequencies(agent).tolist() == [0.0, 0.0, 1.0, 0.0]


def test_gumbel_numbers_at_the_extremes() -> None:
    assert gumbel(torch.tensor(math.exp(-1))).item() == pytest.approx(0.0, abs=1e-6)
    assert gumbel(torch.tensor([0.0, 1.0 - 2**-24])).isfinite().all()


@pytest.mark.parametrize("exploration", ["epsilon_greedy", "softmax"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_evaluation_is_greedy(head, exploration) -> None:
    agent = make(head=head, exploration=exploration)
    agent.exploration_rate = 1.0
    N = 64
    x, state, no = torch.randn(N, 3), agent.initial_state(N), torch.zeros(N, dtype=torch.bool)
    greedy = agent.act(x, state, no, greedy=True)
    best = agent.head.values(agent.of_latent(greedy.latent)).argmax(-1)
    assert torch.equal(greedy.action, best)
    assert not torch.equal(agent.act(x, state, no).action, best)


def test_the_generator_decides_the_action() -> None:
    agent = make()
    agent.exploration_rate = 1.0
    x, state, no = torch.randn(64, 3), agent.initial_state(64), torch.zeros(64, dtype=torch.bool)

    def actions(seed: int) -> Tensor:
        return agent.act(x, state, no, generator=torch.Generator().manual_seed(seed)).action

    assert torch.equal(actions(0), actions(0))
    assert not torch.equal(actions(0), actions(1))


def test_noise_given_is_noise_used() -> None:
    agent = make()
    agent.exploration_rate = 1.0
    x, state, no = torch.randn(8, 3), agent.initial_state(8), torch.zeros(8, dtype=torch.bool)
    noise = agent.noise(3, 8)
    assert noise.shape == (3, 8, 4)
    assert torch.equal(agent.act(x, state, no, noise=noise[1]).action, noise[1].argmax(-1))
