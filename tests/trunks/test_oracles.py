"""LSTM and GRU against torch's own modules, episode by episode, and against numbers worked by hand."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lit_rl.trunks import GRU, LSTM, recurrent
from lit_rl.trunks.resets import StretchedRows

B, T, F, D, LAYERS = 4, 23, 5, 6, 2
PAIRS = [(LSTM, nn.LSTM), (GRU, nn.GRU)]


@pytest.fixture(params=["compiled", "kernel"])
def way(request, monkeypatch):
    """Both ways through sequences, whatever this machine would choose."""
    if request.param == "kernel":
        monkeypatch.setattr(recurrent, "can_be_compiled", lambda *tensors: False)
    else:
        monkeypatch.setattr(LSTM, "has_quick_kernel", False)
    return request.param


def pair(trunk_class, torch_class, dtype=torch.float32):
    """A trunk and the torch module with the same weights, none of them zero."""
    torch.manual_seed(0)
    oracle = torch_class(F, D, LAYERS, batch_first=True, dtype=dtype)
    trunk = trunk_class(F, d_model=D, n_layers=LAYERS).to(dtype)
    trunk.rnn.load_state_dict(oracle.state_dict())
    return trunk, oracle


def episodes_by_oracle(oracle, x_BTF, state, is_init_BT):
    """Each episode of each row run alone: ``y [B, T, D]`` and the last memory, entries ``[B, LAYERS, D]``."""
    rows, last = [], []
    for row in range(len(x_BTF)):
        memory = tuple(entry[row, :, None] for entry in state)  # [LAYERS, 1, D]
        cuts = [0, *is_init_BT[row].nonzero().flatten().tolist(), x_BTF.shape[1]]
        outputs = []
        for start, stop in pairwise(cuts):
            if is_init_BT[row, start]:
                memory = tuple(torch.zeros_like(entry) for entry in memory)
            if stop > start:
                episode = x_BTF[row : row + 1, start:stop]
                y, memory = oracle(episode, memory if len(memory) == 2 else memory[0])
                memory = memory if isinstance(memory, tuple) else (memory,)
                outputs.append(y)
        rows.append(torch.cat(outputs, dim=1))
        last.append([entry[:, 0] for entry in memory])
    return torch.cat(rows), [torch.stack(entries) for entries in zip(*last, strict=True)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("trunk_class", "torch_class"), PAIRS)
@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, T])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_torch_on_each_episode(trunk_class, torch_class, probability, steps, dtype, tolerance):
    trunk, oracle = pair(trunk_class, torch_class, dtype)
    x_BTF = torch.randn(B, steps, F, dtype=dtype)
    is_init_BT = torch.rand(B, steps) < probability
    state = trunk.initial_state(B).apply(torch.randn_like)
    entries = [state[key].clone().requires_grad_() for key in trunk.state_keys]
    y_expected, last_expected = episodes_by_oracle(oracle, x_BTF, entries, is_init_BT)

    given = state.clone()
    for key in trunk.state_keys:
        given[key].requires_grad_()
    y, last = trunk(x_BTF, given, is_init_BT)
    torch.testing.assert_close(y, y_expected, rtol=0, atol=tolerance)
    for key, expected in zip(trunk.state_keys, last_expected, strict=True):
        torch.testing.assert_close(last[key], expected, rtol=0, atol=tolerance)

    weight_y, weight_last = torch.randn_like(y), torch.randn_like(last["h"])
    ours = (y * weight_y).sum() + sum((last[key] * weight_last).sum() for key in trunk.state_keys)
    theirs = (y_expected * weight_y).sum() + sum((entry * weight_last).sum() for entry in last_expected)
    found = torch.autograd.grad(ours, [*trunk.parameters(), *(given[key] for key in trunk.state_keys)])
    expected = torch.autograd.grad(theirs, [*oracle.parameters(), *entries], materialize_grads=True)
    for gradient, reference in zip(found, expected, strict=True):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(gradient, reference, rtol=0, atol=10 * tolerance * scale)


@pytest.mark.parametrize(("trunk_class", "torch_class"), PAIRS)
def test_weights_go_both_ways(trunk_class, torch_class):
    trunk, oracle = pair(trunk_class, torch_class)
    assert {name.removeprefix("rnn.") for name in trunk.state_dict()} == set(oracle.state_dict())
    oracle.load_state_dict(trunk_class(F, d_model=D, n_layers=LAYERS).rnn.state_dict())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("trunk_class", "torch_class"), PAIRS)
def test_large_weights_do_not_open_the_gates_at_a_reset(trunk_class, torch_class):
    trunk, _ = pair(trunk_class, torch_class)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter *= 50
    x_BTF = 10 * torch.randn(B, T, F)
    is_init_BT = torch.zeros(B, T, dtype=torch.bool)
    is_init_BT[1:, 9] = True
    y_BTD, _ = trunk(x_BTF, trunk.initial_state(B).apply(torch.randn_like), is_init_BT)
    fresh_BTD, _ = trunk(
        x_BTF[1:, 9:], trunk.initial_state(B - 1), torch.zeros(B - 1, T - 9, dtype=torch.bool)
    )
    torch.testing.assert_close(y_BTD[1:, 9:], fresh_BTD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trunk_class", [LSTM, GRU])
def test_whole_module_in_bfloat16_resets_exactly(trunk_class):
    trunk = trunk_class(F, d_model=D).bfloat16()
    x_BTF = torch.randn(B, T, F).bfloat16()
    is_init_BT = torch.zeros(B, T, dtype=torch.bool)
    is_init_BT[:, 9] = True
    is_init_BT[0, 4] = True
    y_BTD, state = trunk(x_BTF, trunk.initial_state(B), is_init_BT)
    fresh_BTD, _ = trunk(x_BTF[:, 9:], trunk.initial_state(B), torch.zeros(B, T - 9, dtype=torch.bool))
    assert y_BTD.dtype == state["h"].dtype == torch.bfloat16
    torch.testing.assert_close(
        y_BTD[:, 9:], fresh_BTD, rtol=0, atol=2**-7
    )  # two units of the last place at 1


@pytest.mark.usefixtures("way")
def test_gru_by_hand():
    # Width 1, everything zero but: z = sigmoid(log 3) = 3/4, W_in = 1. So n_t = tanh(x_t) and
    # h_t = n_t / 4 + 3/4 h_{t-1}; x = atanh of 0.8, 0.4, -0.4 with a reset before the third step.
    trunk = GRU(1, d_model=1)
    for parameter in trunk.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        trunk.rnn.weight_ih_l0[2] = 1.0
        trunk.rnn.bias_ih_l0[1] = math.log(3)
    state = trunk.initial_state(1)
    state["h"] += 1.0
    x_BTF = torch.tensor([0.8, 0.4, -0.4]).atanh().reshape(1, 3, 1)
    y_BTD, last = trunk(x_BTF, state, torch.tensor([[False, False, True]]))
    # 0.2 + 0.75 = 0.95; 0.1 + 0.7125 = 0.8125; -0.1.
    torch.testing.assert_close(y_BTD.flatten(), torch.tensor([0.95, 0.8125, -0.1]))
    torch.testing.assert_close(last["h"].flatten(), torch.tensor([-0.1]))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("trunk_class", [LSTM, GRU])
def test_gates_stay_finite_where_exponentials_overflow(trunk_class):
    trunk = trunk_class(F, d_model=D)
    x_BTF = 1e30 * torch.randn(B, T, F)
    is_init_BT = torch.rand(B, T) < 0.2
    y_BTD, state = trunk(x_BTF, trunk.initial_state(B), is_init_BT)
    y_BTD.sum().backward()
    assert y_BTD.abs().max() <= 1
    assert all(memory.isfinite().all() for memory in state.values())
    assert all(parameter.grad.isfinite().all() for parameter in trunk.parameters())


@pytest.mark.parametrize("trunk_class", [LSTM, GRU])
def test_compiled_loops_pass_nan_on_but_not_across_a_reset(trunk_class):
    trunk = trunk_class(F, d_model=D)
    x_BTF = torch.randn(B, T, F)
    x_BTF[0, 5] = torch.nan
    is_init_BT = torch.zeros(B, T, dtype=torch.bool)
    is_init_BT[:, 9] = True
    y_BTD, state = trunk(x_BTF, trunk.initial_state(B), is_init_BT)
    assert y_BTD[0, 5:9].isnan().all()
    assert y_BTD[0, :5].isfinite().all()
    assert y_BTD[0, 9:].isfinite().all()
    assert y_BTD[1:].isfinite().all()
    assert all(memory.isfinite().all() for memory in state.values())


@pytest.mark.parametrize(
    ("trunk_class", "resets", "compiles"), [(LSTM, False, False), (LSTM, True, True), (GRU, False, True)]
)
def test_which_way_is_taken(trunk_class, resets, compiles, monkeypatch):
    scanned = []
    monkeypatch.setattr(
        trunk_class, "scan", lambda self, x, memory, weights: scanned.append(x) or (x, memory)
    )
    trunk = trunk_class(D, d_model=D)
    is_init_BT = torch.full((B, T), resets)
    trunk(torch.randn(B, T, D), trunk.initial_state(B), is_init_BT)
    assert (not scanned) == compiles


@pytest.mark.parametrize("trunk_class", [LSTM, GRU])
def test_transforms_of_functions_go_through_torch(trunk_class):
    trunk = trunk_class(F, d_model=D)
    x_BTF, is_init_BT = torch.randn(B, T, F), torch.zeros(B, T, dtype=torch.bool)
    is_init_BT[:, 9] = True

    def loss(parameters):
        y, _ = torch.func.functional_call(trunk, parameters, (x_BTF, trunk.initial_state(B), is_init_BT))
        return y.square().sum()

    parameters = dict(trunk.named_parameters())
    by_transform = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(by_transform[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trunk_class", [LSTM, GRU])
def test_second_derivatives_are_refused_not_lost(trunk_class):
    trunk = trunk_class(F, d_model=D)
    x_BTF = torch.randn(B, T, F, requires_grad=True)
    y, _ = trunk(x_BTF, trunk.initial_state(B), torch.ones(B, T, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x_BTF, create_graph=True)


@pytest.mark.parametrize("trunk_class", [LSTM, GRU])
def test_gradients_keep_their_type_where_backward_runs_under_autocast(trunk_class):
    trunk = trunk_class(F, d_model=D)
    x_BTF = torch.randn(B, T, F, requires_grad=True)
    gradients = []
    for autocast in (False, True):
        y, _ = trunk(x_BTF, trunk.initial_state(B), torch.ones(B, T, dtype=torch.bool))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gradients.append(torch.autograd.grad(y.sum(), [x_BTF, *trunk.parameters()]))
    for plain, under_autocast in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, under_autocast, rtol=0, atol=0)


def test_stretched_rows_by_hand():
    is_init_BT = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    rows = StretchedRows.around_resets(is_init_BT, torch.float32)
    assert rows.at.view(3, 4).tolist() == [[0, 1, 3, 5], [6, 7, 8, 9], [12, 14, 15, 16]]
    reset_BK, padding_BK = rows.flags_BK2.unbind(-1)
    assert reset_BK.tolist() == [[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert padding_BK.tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]
    x_BTF = torch.arange(1.0, 13.0).reshape(3, 4, 1)
    stretched_BKF = rows.stretch(x_BTF)
    assert stretched_BKF[0].flatten().tolist() == [1, 2, 0, 3, 0, 4]
    assert rows.real_steps(stretched_BKF).equal(x_BTF)
    assert rows.last_real_step(stretched_BKF).equal(x_BTF[:, -1])
