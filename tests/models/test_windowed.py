"""A trunk over a sliding window: the contract, and a literal pass over each window alone."""

import copy

import pytest
import torch
from helpers import installed_trunks, small
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.models.windowed import STARTS, Windowed
from lit_rl.testing import Subject
from lit_rl.testing.trunk_checks import CHECKS, Check
from lit_rl.testing.trunk_checks.platforms import check_compile
from lit_rl.trunks import GRU, LSTM, MLP, Trunk

torch.set_num_threads(1)

F, WINDOW = 3, 4


class WindowedLSTM(Windowed):
    """With a constructor as the kit wants it, and the trunk as a part of its own.

    Its flags are numbers: the kit compares sizes, and booleans have none.
    """

    def __init__(self, in_features: int, *, window: int = 5, d_model: int = 8) -> None:
        trunk = LSTM(in_features, d_model=d_model)
        super().__init__(trunk, in_features, window)
        self.trunk = trunk

    def initial_state(self, batch_size: int) -> TensorDict:
        state = super().initial_state(batch_size)
        return state.set(STARTS, state[STARTS].int())

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        y, state = super().forward(x, state.copy().set(STARTS, state[STARTS].bool()), is_init)
        return y, state.set(STARTS, state[STARTS].int())


@pytest.mark.parametrize("window", [2, 5])
@pytest.mark.parametrize("check", [check for check in CHECKS if check is not check_compile])
def test_it_keeps_the_contract(check: Check, window: int) -> None:
    check(Subject(WindowedLSTM, {"window": window}))


@torch.no_grad()
def make(name: str = "lstm", window: int = WINDOW) -> tuple[Trunk, Windowed]:
    torch.manual_seed(0)
    trunk = small(name)(F)
    for parameter in trunk.parameters():  # memory of some weight
        parameter.add_(0.3 * torch.randn_like(parameter))
    return trunk, Windowed(trunk, F, window)


def literally(trunk: Trunk, x_TF: Tensor, is_init_T: Tensor, window: int) -> Tensor:
    """Step by step: the trunk from its initial state over the last `window` inputs of the episode."""
    outputs = []
    for t in range(len(x_TF)):
        first = max([0, t - window + 1, *(s for s in range(t + 1) if is_init_T[s])])
        x = x_TF[None, first : t + 1]
        y, _ = trunk(x, trunk.initial_state(1), torch.zeros(x.shape[:2], dtype=torch.bool))
        outputs.append(y[0, -1])
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [1, 2, WINDOW])
@pytest.mark.parametrize("name", sorted({*installed_trunks()} - {"mlp"}))
def test_it_sees_the_last_inputs_alone(name: str, window: int) -> None:
    trunk, windowed = make(name, window)
    x, is_init = torch.randn(2, 13, F), torch.rand(2, 13) < 0.2
    is_init[0] = False
    with torch.no_grad():
        y, _ = windowed(x, windowed.initial_state(2), is_init)
        expected = torch.stack([literally(trunk, *row, window) for row in zip(x, is_init, strict=True)])
        carried, _ = trunk(x, trunk.initial_state(2), is_init)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(carried, expected, atol=1e-3)  # memory carried along says something else


def test_what_left_the_window_leaves_no_trace() -> None:
    _, windowed = make()
    x, no = torch.randn(1, 9, F), torch.zeros(1, 9, dtype=torch.bool)
    other = x.clone()
    other[:, : 9 - WINDOW] = 100.0
    y, _ = windowed(x, windowed.initial_state(1), no)
    moved, _ = windowed(other, windowed.initial_state(1), no)
    assert torch.equal(y[:, -1], moved[:, -1])
    assert not torch.allclose(y[:, -2], moved[:, -2])


def test_it_has_no_parameters_of_its_own() -> None:
    _, windowed = make()
    assert not list(windowed.parameters())
    assert not windowed.state_dict()


class Owner(nn.Module):
    """As an agent has both."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk: Trunk = GRU(F, d_model=8)
        self.windowed = Windowed(self.trunk, F, WINDOW)


def test_a_copy_has_the_copied_trunk() -> None:
    torch.manual_seed(0)
    owner = Owner()
    twin = copy.deepcopy(owner)
    x, no = torch.randn(2, 6, F), torch.zeros(2, 6, dtype=torch.bool)

    def y(of: Owner) -> Tensor:
        return of.windowed(x, of.windowed.initial_state(2), no)[0]

    before = y(owner)
    assert torch.equal(y(twin), before)
    with torch.no_grad():
        for parameter in twin.trunk.parameters():
            parameter.add_(0.5)
    assert torch.equal(y(owner), before)
    assert not torch.allclose(y(twin), before)
    twin.trunk.load_state_dict(owner.trunk.state_dict())
    assert torch.equal(y(twin), before)


def test_a_memoryless_trunk_is_as_it_was() -> None:
    trunk = MLP(F, d_model=8)
    windowed = Windowed(trunk, F, WINDOW)
    x, no = torch.randn(2, 6, F), torch.zeros(2, 6, dtype=torch.bool)
    y, _ = windowed(x, windowed.initial_state(2), no)
    torch.testing.assert_close(y, trunk(x, trunk.initial_state(2), no)[0])


class Attentive(GRU):
    """Says that a layer attends to all steps of the episode so far alike, another to the present one."""

    def attention_maps(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Tensor]:
        episode = is_init.cumsum(1)
        same = (episode[:, :, None] == episode[:, None]).float().tril()
        return [same / same.sum(-1, keepdim=True), torch.eye(x.shape[1]).expand(len(x), -1, -1)]


def test_attention_is_that_of_each_steps_window() -> None:
    """Of 3 steps, with a start at the first and the fourth; what is left of the window takes it all."""
    windowed = Windowed(Attentive(F, d_model=8), F, 3)
    x, is_init = torch.randn(2, 6, F), torch.zeros(2, 6, dtype=torch.bool)
    is_init[0, [0, 3]] = True
    alike, own = windowed.attention_maps(x, windowed.initial_state(2), is_init)
    third = 1 / 3
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0, 0, 0],
        [third, third, third, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1 / 2, 1 / 2, 0],
        [0, 0, 0, third, third, third],
    ]
    torch.testing.assert_close(alike[0], torch.tensor(expected))
    expected[3:] = [[0, third, third, third, 0, 0], [0, 0, third, third, third, 0], [0, 0, 0, *[third] * 3]]
    torch.testing.assert_close(alike[1], torch.tensor(expected))
    assert torch.equal(own, torch.eye(6).expand(2, 6, 6))

    _, state = windowed(x[:, :2], windowed.initial_state(2), is_init[:, :2])
    later, _ = windowed.attention_maps(x[:, 2:], state, is_init[:, 2:])
    torch.testing.assert_close(later, alike[:, 2:, 2:])
