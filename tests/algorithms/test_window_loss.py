"""The loss of DQN on windows of steps: errors, priorities and gradients, worked by hand."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import Q_HEADS, Balanced, counter, small, window_loss
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss

from lit_rl import keys
from lit_rl.algorithms.dqn import LitDQN
from lit_rl.algorithms.window_loss import LEAST_PRIORITY
from lit_rl.data.window_replay import Drawn
from lit_rl.models.q_heads import ExpectedQ
from lit_rl.trunks import MLP, Trunk

torch.set_num_threads(1)

# ------------------------------------------------------------------ errors and priorities

# Action values of three states; what the online network thinks best the target network does not.
ONLINE = [[1.0, 2.0], [3.0, 0.0], [0.0, 5.0]]
TARGET = [[10.0, 20.0], [30.0, 40.0], [60.0, 50.0]]


class Seen(Trunk):
    """Gives what it gets."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, in_features)

    def initial_state(self, batch_size: int) -> TensorDict:
        return TensorDict(batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        return x, state


def environment(states: int = 3) -> Any:
    """One-hot states, two actions."""
    one_hot = spaces.Box(0.0, 1.0, (states,), np.float32)
    return SimpleNamespace(id="table", spaces=lambda: (one_hot, spaces.Discrete(2)))


def table(**options: Any) -> LitDQN:
    """Q-tables as networks, gamma 1/2."""
    model = LitDQN(environment(), Seen, gamma=0.5, **options)
    with torch.no_grad():
        for network, values in ((model.agent, ONLINE), (model.target, TARGET)):
            network.head.last.weight.copy_(torch.tensor(values).T)
            network.head.last.bias.zero_()
    return model


def drawn(
    states: Sequence[int],
    actions: Sequence[int],
    rewards: Sequence[float],
    *,
    terminated: Sequence[int] = (),
    no_action: Sequence[int] = (),
    weight: float = 1.0,
) -> Drawn:
    """One window; the step after the last action only bootstraps. Steps are named by their number."""
    T = len(states)
    padding = [0] * (T - len(actions))
    steps = {
        keys.OBSERVATION: torch.eye(3)[torch.tensor(states)],
        keys.ACTION: torch.tensor([*actions, *padding]),
        keys.REWARD: torch.tensor([*rewards, *padding], dtype=torch.float32),
        keys.TERMINATED: torch.tensor([t in terminated for t in range(T)]),
        keys.HAS_ACTION: torch.tensor([t not in no_action for t in range(T)]),
        keys.IS_INIT: torch.zeros(T, dtype=torch.bool),
    }
    windows = TensorDict({keys.STEPS: TensorDict(steps, [T])[None]}, [1])
    return Drawn(windows, torch.tensor([weight]), torch.zeros(1, dtype=torch.long))


def together(*windows: Drawn) -> Drawn:
    return Drawn(*(torch.cat(parts) for parts in zip(*windows, strict=True)))


# Online values of what is done: 1 (state 0, action 0), 0 (state 1, action 1) and 5 (state 2, action 1).
# Double: after state 0 comes state 1, of which the online network prefers 0 and the target says 30.
TWO = drawn([0, 1, 2], [0, 1], [1.0, 2.0])
THREE = drawn([0, 1, 2, 1], [0, 1, 1], [1.0, 2.0, 4.0])
CASES: dict[str, tuple[dict[str, Any], Drawn, list[float]]] = {
    # targets 1 + 30/2 and 2 + 50/2
    "double": ({"window": 2}, TWO, [15.0, 27.0]),
    # targets 1 + 40/2 and 2 + 60/2
    "plain": ({"window": 2, "double": False}, TWO, [20.0, 32.0]),
    # 1 + 2/2 + 50/4, then 2 + 4/2 + 30/4
    "two steps ahead": ({"window": 2, "n_step": 2}, THREE, [13.5, 11.5]),
    # 1, then 2 + 50/2
    "termination": ({"window": 2}, drawn([0, 1, 2], [0, 1], [1.0, 2.0], terminated=[0]), [0.0, 27.0]),
    # 1 + 2/2: the termination comes within the steps ahead
    "termination ahead": (
        {"window": 1, "n_step": 2},
        drawn([0, 1, 2], [0, 1], [1.0, 2.0], terminated=[1]),
        [1.0],
    ),
    # Step 1 is the last observation of a truncated episode: 1 + 30/2; then it does not count; 1 + 30/2
    "truncation": (
        {"window": 3},
        drawn([0, 1, 0, 1], [0, 0, 0], [1.0, 0.0, 1.0], no_action=[1]),
        [15.0, 15.0],
    ),
    # 1 + 30/2 although two steps ahead are asked for
    "truncation ahead": (
        {"window": 1, "n_step": 2},
        drawn([0, 1, 0], [0, 1], [1.0, 99.0], no_action=[1]),
        [15.0],
    ),
    # The first step, of an error of 15, is left out
    "burn-in": ({"window": 2, "burn_in": 1}, TWO, [27.0]),
    "last steps": ({"window": 2, "loss_steps": 1}, TWO, [27.0]),
    # Errors of 15, then 27, then 4 + 30/2 - 5
    "both": ({"window": 3, "burn_in": 1, "loss_steps": 1}, THREE, [14.0]),
}


@pytest.mark.parametrize(("options", "window", "errors"), CASES.values(), ids=CASES)
def test_errors_by_hand(options: dict[str, Any], window: Drawn, errors: list[float]) -> None:
    loss, priority, measured = window_loss(table(**options, priority_eta=0.75), window)
    mean = sum(errors) / len(errors)
    huber = [error - 0.5 if error > 1 else error**2 / 2 for error in errors]
    assert loss.item() == pytest.approx(sum(huber) / len(errors))
    assert measured["td_loss"] == loss
    assert measured["td_error"].item() == pytest.approx(mean)
    assert priority.tolist() == pytest.approx([0.75 * max(errors) + 0.25 * mean + LEAST_PRIORITY], rel=1e-6)


def with_latents(window: Drawn, latents: Tensor) -> Drawn:
    window = Drawn(window.windows.clone(), *window[1:])
    window.windows[keys.STEPS, keys.LATENT] = latents
    return window


@pytest.mark.parametrize("options", [{}, {"latents": True}], ids=["alone", "latents"])
def test_without_memory_only_what_has_a_loss_is_passed_over(options: dict[str, Any]) -> None:
    model = table(window=2, loss_steps=1, **options)
    passed: list[Tensor] = []
    model.agent.trunk.register_forward_hook(lambda module, given, _: passed.append(given[0][0].argmax(-1)))
    window = with_latents(TWO, torch.zeros(1, 3, 3)) if model.loss.latents else TWO
    loss, _, measured = window_loss(model, window)
    assert loss.item() == pytest.approx(26.5)
    assert [steps.tolist() for steps in passed] == [[1], [2]]  # what learns; then what judges the step behind
    if model.loss.latents:
        assert measured["drift"].item() == pytest.approx(1.0)  # of a one-hot latent from zero


@pytest.mark.parametrize("double", [True, False])
def test_stored_latents_alone_stand_behind_the_last_step(double: bool) -> None:
    """With one step in the loss the target network passes over nothing."""
    model = table(window=2, loss_steps=1, latents=True, latent_targets=True, double=double)
    passed: list[Tensor] = []
    model.target.trunk.register_forward_hook(lambda module, given, _: passed.append(given[0]))
    # Of a stored latent twice state 2 the online network prefers 1, and the target network says 100 and 120.
    _, _, measured = window_loss(model, with_latents(TWO, 2 * torch.eye(3)[None]))
    assert measured["td_error"].item() == pytest.approx(2 + (100 if double else 120) / 2)
    assert not passed


def test_squared_errors_by_hand() -> None:
    loss, _, _ = window_loss(table(window=2, head=partial(ExpectedQ, loss="mse")), TWO)
    assert loss.item() == pytest.approx((15.0**2 + 27.0**2) / 2 / 2)


def test_priorities_are_of_the_largest_error_and_of_the_mean() -> None:
    for eta, expected in ((0.0, 21.0), (1.0, 27.0), (0.9, 26.4)):
        _, priority, _ = window_loss(table(window=2, priority_eta=eta), TWO)
        assert priority.tolist() == pytest.approx([expected + LEAST_PRIORITY])


class Started(Trunk):
    """Adds up what it sees, from a start that is learnt."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, in_features)
        self.start = nn.Parameter(torch.full((in_features,), 2.0))

    def initial_state(self, batch_size: int) -> TensorDict:
        return TensorDict({"sum": self.start.expand(batch_size, -1)}, batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        total, sums = state["sum"], []
        for t in range(x.shape[1]):
            total = torch.where(is_init[:, t, None], self.start, total) + x[:, t]
            sums.append(total)
        return torch.stack(sums, 1), TensorDict({"sum": total}, state.batch_size)


def test_each_network_starts_from_its_own_memory() -> None:
    model = LitDQN(environment(), Started, window=2, loss_steps=1)
    agent, target = model.agent, model.target
    with torch.no_grad():
        agent.trunk.start.fill_(5.0)
    lesson = model.loss.lesson(target, TWO)
    prediction = model.loss.predict(agent, lesson)
    first, second, third = torch.eye(3)
    torch.testing.assert_close(prediction.predicted[0, 0], agent.of_latent(5 + first + second)[1])
    torch.testing.assert_close(lesson.target[0, 0], target.of_latent(2 + second + third))
    prediction.loss.backward()
    assert agent.trunk.start.grad.any()


def test_errors_are_clipped_in_priorities_alone() -> None:
    options = {"window": 2, "priority_eta": 0.75}
    loss, priority, measured = window_loss(table(**options, priority_clip=20.0), TWO)  # errors of 15 and 27
    assert priority.tolist() == pytest.approx([0.75 * 20 + 0.25 * (15 + 20) / 2 + LEAST_PRIORITY])
    expected, _, measured_so = window_loss(table(**options), TWO)
    assert loss == expected
    assert measured["td_error"] == measured_so["td_error"]


def test_a_window_without_error_has_the_least_priority() -> None:
    right = drawn([0, 1], [0], [1.0], terminated=[0])
    _, priority, _ = window_loss(table(), right)
    assert priority.tolist() == pytest.approx([LEAST_PRIORITY])
    assert LEAST_PRIORITY > 0


def test_steps_weigh_as_their_window_does() -> None:
    """Importance weights multiply errors; all steps that count are averaged, whichever window has them."""
    one = drawn([0, 1, 2], [0, 1], [1.0, 2.0], weight=0.5)  # 14.5 and 26.5
    other = drawn([1, 0, 2], [1, 0], [3.0, 0.0], no_action=[1], weight=0.25)  # 3 + 20/2 - 0: 12.5
    loss, priority, measured = window_loss(table(window=2), together(one, other))
    assert loss.item() == pytest.approx((0.5 * (14.5 + 26.5) + 0.25 * 12.5) / 3)
    assert priority.tolist() == pytest.approx([26.4, 13.0])  # weights do not touch them
    assert measured["td_error"].item() == pytest.approx((21.0 + 13.0) / 2)
    assert measured["q"].item() == pytest.approx((1.0 + 0.0 + 0.0) / 3)


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize("double", [True, False])
def test_torchrls_loss_is_the_same_for_single_steps(double: bool) -> None:
    torch.manual_seed(0)
    observation, M = spaces.Box(-1, 1, (4,)), 32
    env: Any = SimpleNamespace(id="any", spaces=lambda: (observation, spaces.Discrete(3)))
    model = LitDQN(env, partial(MLP, d_model=8), gamma=0.9, double=double)

    def as_torchrls(network: nn.Module) -> QValueActor:
        first, second = network.trunk.layers
        layers = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), network.head.last)
        return QValueActor(layers, in_keys=["observation"], action_space="categorical")

    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    options = {"loss_function": "smooth_l1", "delay_value": True, "double_dqn": double}
    oracle = DQNLoss(as_torchrls(model.agent), action_space="categorical", **options)
    oracle.make_value_estimator(gamma=0.9)
    oracle.target_value_network_params.update_(TensorDict.from_module(as_torchrls(model.target)).data)

    steps = {
        keys.OBSERVATION: torch.randn(M, 2, 4),
        keys.ACTION: torch.randint(0, 3, (M, 2)),
        keys.REWARD: torch.randn(M, 2),
        keys.TERMINATED: torch.rand(M, 2) < 0.3,
        keys.IS_INIT: torch.zeros(M, 2, dtype=torch.bool),
        keys.HAS_ACTION: torch.ones(M, 2, dtype=torch.bool),
    }
    windows = TensorDict({keys.STEPS: TensorDict(steps, [M, 2])}, [M])
    loss, _, _ = window_loss(model, Drawn(windows, torch.ones(M), torch.arange(M)))
    ended = steps[keys.TERMINATED][:, :1]
    theirs = oracle(
        TensorDict(
            {
                "observation": steps[keys.OBSERVATION][:, 0],
                "action": steps[keys.ACTION][:, 0],
                "next": {
                    "observation": steps[keys.OBSERVATION][:, 1],
                    "reward": steps[keys.REWARD][:, :1],
                    "done": ended,
                    "terminated": ended,
                },
            },
            [M],
        )
    )
    torch.testing.assert_close(loss, theirs["loss"])


# ------------------------------------------------------------------ gradients


def windows_of_noise(model: LitDQN, M: int = 4) -> TensorDict:
    """Any windows as the model wants them, of `counter` or `walk`: two numbers a step, seen with gradient."""
    shape = model.window_shape
    T = shape.window + shape.lookahead
    steps = {
        keys.OBSERVATION: torch.randn(M, T, 2).requires_grad_(),
        keys.ACTION: torch.randint(0, 2, (M, T)),
        keys.REWARD: torch.randn(M, T),
        keys.TERMINATED: torch.zeros(M, T, dtype=torch.bool),
        keys.IS_INIT: torch.zeros(M, T, dtype=torch.bool),
        keys.HAS_ACTION: torch.ones(M, T, dtype=torch.bool),
    }
    windows = TensorDict({keys.STEPS: TensorDict(steps, [M, T])}, [M])
    if shape.with_state:
        state = model.agent.trunk.initial_state(M)
        windows[keys.TRUNK_STATE] = state.apply(lambda leaf: torch.randn_like(leaf).requires_grad_())
    return windows


def all_equal(windows: TensorDict) -> Drawn:
    return Drawn(windows, torch.ones(len(windows)), torch.arange(len(windows)))


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({}, [True, True, True, True, False, False]),
        ({"loss_steps": 1}, [True, True, True, True, False, False]),
        ({"burn_in": 2}, [False, False, True, True, False, False]),
        ({"burn_in": 1, "loss_steps": 1}, [False, True, True, True, False, False]),
    ],
    ids=str,
)
def test_the_gradient_reaches_back_to_the_burn_in(options: dict[str, Any], reached: list[bool]) -> None:
    """Through the memory, from the last step alone if need be; never into what only bootstraps."""
    model = LitDQN(counter(), small("lstm"), window=4, n_step=2, context="stored", **options)
    windows = windows_of_noise(model)
    window_loss(model, all_equal(windows))[0].backward()
    gradient = windows[keys.STEPS, keys.OBSERVATION].grad
    assert gradient.abs().sum((0, 2)).bool().tolist() == reached
    state = windows[keys.TRUNK_STATE]
    assert all((leaf.grad is not None) == ("burn_in" not in options) for leaf in state.values())
    assert all(parameter.grad.any() for parameter in model.agent.parameters())
    assert all(parameter.grad is None for parameter in model.target.parameters())
    assert not any(parameter.requires_grad for parameter in model.target.parameters())


def test_burn_in_is_a_pass_without_gradient() -> None:
    """What is learnt behind it is what a window learns that starts there, from the memory it leaves."""
    model = LitDQN(counter(), small("lstm"), window=5, burn_in=2, context="stored")
    windows = windows_of_noise(model).detach()
    loss, priority, _ = window_loss(model, all_equal(windows))
    loss.backward()

    steps = windows[keys.STEPS]
    with torch.no_grad():
        _, _, state = model.agent(
            steps[keys.OBSERVATION][:, :2], windows[keys.TRUNK_STATE], steps[keys.IS_INIT][:, :2]
        )
    shorter = LitDQN(counter(), small("lstm"), window=3, context="stored")
    shorter.load_state_dict(model.state_dict())
    rest = TensorDict({keys.STEPS: steps[:, 2:], keys.TRUNK_STATE: state}, [len(windows)])
    again, same, _ = window_loss(shorter, all_equal(rest))
    again.backward()
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(same, priority)
    for parameter, reference in zip(shorter.agent.parameters(), model.agent.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


def test_auxiliary_losses_join_the_loss() -> None:
    """That of the pass that learns, with its gradient, and not of one after it."""

    balanced, plain = LitDQN(counter(), Balanced, window=3), LitDQN(counter(), MLP, window=3)
    plain.load_state_dict(balanced.state_dict())
    windows = windows_of_noise(plain).detach()
    loss, _, measured = window_loss(balanced, all_equal(windows))
    loss.backward()
    td_loss, _, _ = window_loss(plain, all_equal(windows))
    steps = windows[keys.STEPS][:, :3]
    y, _ = plain.agent.trunk(steps[keys.OBSERVATION], TensorDict(), steps[keys.IS_INIT])
    expected = y.square().mean()
    (td_loss + expected).backward()
    torch.testing.assert_close(measured["td_loss"], td_loss.detach())
    torch.testing.assert_close(measured["auxiliary_loss"], expected.detach())
    torch.testing.assert_close(loss, td_loss + expected)
    for parameter, reference in zip(balanced.agent.parameters(), plain.agent.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


@pytest.mark.parametrize("head", Q_HEADS.values(), ids=Q_HEADS)
def test_errors_are_of_expected_values_for_every_head(head: Callable) -> None:
    torch.manual_seed(0)
    model = LitDQN(counter(), MLP, head, priority_eta=1.0)
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    windows = windows_of_noise(model).detach()
    _, priority, measured = window_loss(model, all_equal(windows))
    steps, errors = windows[keys.STEPS], []
    with torch.no_grad():
        online, target = (
            network.head.values(network(steps[keys.OBSERVATION], windows, steps[keys.IS_INIT])[0])
            for network in (model.agent, model.target)
        )
    for m in range(len(windows)):
        best = online[m, 1].argmax()
        td_target = steps[keys.REWARD][m, 0] + 0.99 * target[m, 1, best]
        errors.append((td_target - online[m, 0, steps[keys.ACTION][m, 0]]).abs().item())
    assert (priority - LEAST_PRIORITY).tolist() == pytest.approx(errors, rel=1e-4)
    assert measured["td_error"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
