"""The trunk `simple_ssm` keeps lit_rl's contract and computes its recurrence.

Shapes: B rows, T time steps, F input features, D = d_model, N = d_state.
"""

import pytest
import torch
from lit_rl_ssm.improved import ImprovedSSM
from lit_rl_ssm.simple import SimpleSSM
from torch.nn.functional import layer_norm

from lit_rl import registry
from lit_rl.testing import TrunkConformance
from lit_rl.testing.trunk_checks import Subject
from lit_rl.testing.trunk_checks.contract import check_no_leak_between_episodes

torch.set_num_threads(1)


class TestSimpleSSM(TrunkConformance):
    trunk = SimpleSSM
    options = ({"d_model": 12, "d_state": 7},)


def literal(p, x, s, is_init):
    """The equations of the module, one row and one step at a time."""
    a = 1 / (1 + torch.exp(p["a_raw"]))  # exp(-softplus(a_raw)) = exp(-log(1 + e^a_raw))
    rows = []
    for b in range(x.shape[0]):
        state, outputs = s[b], []
        for t in range(x.shape[1]):
            if is_init[b, t]:
                state = torch.zeros_like(state)
            u = p["input_proj.weight"] @ x[b, t] + p["input_proj.bias"]
            u = torch.tanh(layer_norm(u, u.shape, p["norm.weight"], p["norm.bias"]))
            state = a * state + p["B.weight"] @ u
            outputs.append(torch.tanh(p["C.weight"] @ state + p["C.bias"] + p["D"] * u))
        rows.append((torch.stack(outputs), state))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("trunk", [SimpleSSM, ImprovedSSM])
def test_leaky_fails_the_check_of_leaks(trunk):
    check_no_leak_between_episodes(Subject(trunk, {"d_model": 8}))
    with pytest.raises(AssertionError, match="reset"):
        check_no_leak_between_episodes(Subject(trunk, {"d_model": 8, "reset": "leaky"}))
    with pytest.raises(ValueError, match="reset must be one of strict, leaky, not 'never'"):
        trunk(3, reset="never")


@pytest.mark.parametrize("steps", [1, 23, 1024])
def test_trunk_equals_the_literal_recurrence(steps):
    torch.manual_seed(steps)
    rows = 1 if steps == 1024 else 3
    trunk = SimpleSSM(4, d_model=8, d_state=6).double()
    x = torch.randn(rows, steps, 4).double().requires_grad_()
    state = trunk.initial_state(rows)
    state["s"] = torch.randn(rows, 6).double().requires_grad_()
    is_init = torch.rand(rows, steps) < 0.15
    parameters = dict(trunk.named_parameters())
    y, last = trunk(x, state, is_init)
    found, expected = [y, last["s"]], literal(parameters, x, state["s"], is_init)
    weights = [torch.randn_like(tensor) for tensor in expected]
    for tensors in (found, expected):
        total = sum((tensor * weight).sum() for tensor, weight in zip(tensors, weights, strict=True))
        tensors += torch.autograd.grad(total, [x, state["s"], *parameters.values()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_time_constants_start_between_two_and_a_thousand_steps():
    trunk = SimpleSSM(4)
    tau = 1 / (1 - torch.exp(-torch.nn.functional.softplus(trunk.a_raw.detach().double())))
    assert tau[0].item() == pytest.approx(2, rel=1e-3)
    assert tau[-1].item() == pytest.approx(1000, rel=1e-3)
    assert (tau.log().diff() > 0).all()


def test_every_state_starts_at_the_size_of_its_input():
    torch.manual_seed(0)
    trunk = SimpleSSM(4, d_state=16)
    writes = torch.randn(16, 8000, 128)
    never = torch.zeros(16, 8000, dtype=torch.bool)
    with torch.no_grad():
        sizes = trunk._scan(trunk.B(writes), torch.zeros(16, 16), never)[0][:, 4000:].std(dim=(0, 1))
    assert sizes.max() < 1.5 * sizes.min()


def test_memory_lasts_until_a_reset():
    torch.manual_seed(0)
    trunk = SimpleSSM(4, d_model=16)
    x, is_init = torch.randn(1, 40, 4), torch.zeros(1, 40, dtype=torch.bool)
    moved = x.clone()
    moved[:, 0] += 1
    state = trunk.initial_state(1)
    change = (trunk(moved, state, is_init)[0] - trunk(x, state, is_init)[0]).abs().amax(dim=(0, 2))
    assert (change > 1e-4).all()
    is_init[:, 20] = True
    change = (trunk(moved, state, is_init)[0] - trunk(x, state, is_init)[0]).abs().amax(dim=(0, 2))
    assert (change[:20] > 1e-4).all()
    assert not change[20:].any()


def test_name_leads_to_the_class():
    assert registry.class_path("simple_ssm") == f"{SimpleSSM.__module__}.{SimpleSSM.__name__}"


@pytest.mark.parametrize("name", ["d_model", "d_state"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        SimpleSSM(3, **{name: 0})


def test_state_of_another_trunk_or_size_is_refused():
    trunk = SimpleSSM(3, d_model=8)
    x, is_init = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"has no 's', SimpleSSM keeps 's' \[2, 64\]"):
        trunk(x, ImprovedSSM(3, d_model=8).initial_state(2), is_init)
    with pytest.raises(ValueError, match=r"has 's' \[3, 64\], SimpleSSM keeps 's' \[2, 64\]"):
        trunk(x, trunk.initial_state(3), is_init)
