"""The trunk `improved_ssm` keeps lit_rl's contract, computes its recurrence, and stays bounded.

Shapes: B rows, T time steps, F input features, D = d_model, N = d_state, L = n_layers.
"""

import pytest
import torch
from lit_rl_ssm.dense_scan import dense_scan, norm_bound
from lit_rl_ssm.improved import ImprovedSSM
from lit_rl_ssm.simple import SimpleSSM
from torch.nn.functional import layer_norm

from lit_rl import registry
from lit_rl.testing import TrunkConformance

torch.set_num_threads(1)

ALL_OFF = {"layer_norm": False, "orthogonal_init": False, "residual": False}


class TestImprovedSSM(TrunkConformance):
    trunk = ImprovedSSM
    options = (
        {"d_model": 12, "d_state": 7},
        {"d_model": 9, "d_state": 4, "n_layers": 3, **ALL_OFF},
    )


def literal(p, x, h, is_init, *, residual: bool):
    """The equations of the module, one row and one step at a time; the bound by eigenvalues."""
    layers = p["A"].shape[0]
    transitions = []
    for A in p["A"]:
        squared_singular_values = torch.linalg.eigvalsh(A.t() @ A)
        bound = (squared_singular_values**32).sum() ** (1 / 64)
        transitions.append(A / bound if bound > 1 else A)
    rows = []
    for b in range(x.shape[0]):
        states, outputs = list(h[b]), []
        for t in range(x.shape[1]):
            if is_init[b, t]:
                states = [torch.zeros_like(state) for state in states]
            u = torch.relu(p["input_proj.weight"] @ x[b, t] + p["input_proj.bias"])
            for i in range(layers):
                states[i] = transitions[i] @ states[i] + p["B"][i] @ u
                z = p["C"][i] @ states[i] + p["D"][i] @ u
                if f"norms.{i}.weight" in p:
                    z = layer_norm(z, z.shape, p[f"norms.{i}.weight"], p[f"norms.{i}.bias"])
                u = z + u if residual and i > 0 else z
            outputs.append(u)
        rows.append((torch.stack(outputs), torch.stack(states)))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("scale", [0.9, 1.5], ids=["bound below 1", "bound above 1"])
@pytest.mark.parametrize("options", [{}, ALL_OFF], ids=["all on", "all off"])
@pytest.mark.parametrize("steps", [1, 21])
def test_trunk_equals_the_literal_recurrence(steps, options, scale):
    torch.manual_seed(steps)
    trunk = ImprovedSSM(4, d_model=8, d_state=6, **options).double()
    with torch.no_grad():
        trunk.A *= scale / norm_bound(trunk.A)
    x = torch.randn(3, steps, 4).double().requires_grad_()
    state = trunk.initial_state(3)
    state["h"] = torch.randn(3, 2, 6).double().requires_grad_()
    is_init = torch.rand(3, steps) < 0.15
    parameters = dict(trunk.named_parameters())
    y, last = trunk(x, state, is_init)
    expected = literal(parameters, x, state["h"], is_init, residual=options.get("residual", True))
    found = [y, last["h"]]
    weights = [torch.randn_like(tensor) for tensor in expected]
    for tensors in (found, expected):
        total = sum((tensor * weight).sum() for tensor, weight in zip(tensors, weights, strict=True))
        tensors += torch.autograd.grad(total, [x, state["h"], *parameters.values()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 1024])
def test_dense_scan_equals_the_loop(steps):
    torch.manual_seed(steps)
    A = torch.linalg.qr(torch.randn(4, 4).double())[0].requires_grad_()
    v, h = torch.randn(2, steps, 4).double().requires_grad_(), torch.randn(2, 4).double().requires_grad_()
    is_init = torch.rand(2, steps) < 0.02
    expected, now = [], h
    for t in range(steps):
        now = (now * ~is_init[:, t, None]) @ A.t() + v[:, t]
        expected.append(now)
    expected = torch.stack(expected, dim=1)
    found = dense_scan(A, v, h, is_init)
    weight = torch.randn_like(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), [A, v, h]),
        torch.autograd.grad((expected * weight).sum(), [A, v, h]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 5, 64, 300])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_bound_is_above_the_spectral_norm_and_near(size, scale):
    torch.manual_seed(size)
    orthogonal = torch.linalg.qr(torch.randn(size, size))[0]
    rank_one = torch.ones(size, size) / size
    matrices = scale * torch.stack([torch.randn(size, size), orthogonal, rank_one])
    bound, exact = norm_bound(matrices).flatten(), torch.linalg.matrix_norm(matrices, 2)
    assert (bound >= exact * (1 - 1e-5)).all()
    assert (bound <= exact * size ** (1 / 64) * (1 + 1e-5)).all()


def test_a_long_pass_equals_single_steps():
    torch.manual_seed(0)
    trunk = ImprovedSSM(4, d_model=8, d_state=6).double()
    x, is_init = torch.randn(2, 1024, 4).double(), torch.rand(2, 1024) < 0.01
    with torch.no_grad():
        whole, last = trunk(x, trunk.initial_state(2), is_init)
        state, steps = trunk.initial_state(2), []
        for t in range(1024):
            y, state = trunk(x[:, t : t + 1], state, is_init[:, t : t + 1])
            steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-10)
    for key, leaf in last.items():
        torch.testing.assert_close(state[key], leaf, rtol=0, atol=1e-10)


def test_first_transition_is_used_as_it_is():
    torch.manual_seed(0)
    trunk = ImprovedSSM(3)
    identity = torch.eye(64).expand(2, -1, -1)
    torch.testing.assert_close(trunk.A @ trunk.A.mT, 0.81 * identity, rtol=0, atol=1e-5)
    assert (norm_bound(trunk.A) < 1).all()


def test_large_transition_does_not_explode():
    torch.manual_seed(0)
    trunk = ImprovedSSM(3, d_model=16, d_state=8, layer_norm=False)
    with torch.no_grad():
        trunk.A.mul_(3)
        never = torch.zeros(1, 2000, dtype=torch.bool)
        y, _ = trunk(torch.randn(1, 2000, 3), trunk.initial_state(1), never)
        # Negative control: unbounded, the same matrix leaves the range of float32.
        unbounded = dense_scan(trunk.A[0], torch.randn(1, 2000, 8), torch.zeros(1, 8), never)
    assert y.isfinite().all()
    assert not unbounded.isfinite().all()


def test_options_do_what_they_say():
    assert not any("norms" in name for name, _ in ImprovedSSM(3, layer_norm=False).named_parameters())
    A = ImprovedSSM(3, orthogonal_init=False).A
    assert (A @ A.mT - 0.81 * torch.eye(64)).abs().max() > 0.1
    torch.manual_seed(0)
    trunk = ImprovedSSM(3, n_layers=2, layer_norm=False)
    x, is_init = torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.bool)
    with torch.no_grad():
        trunk.C[1].zero_()
        trunk.D[1].zero_()
        y, _ = trunk(x, trunk.initial_state(1), is_init)
        assert y.abs().max() > 0.01
        trunk.residual = False
        y, _ = trunk(x, trunk.initial_state(1), is_init)
        assert not y.any()


def test_name_leads_to_the_class():
    assert registry.class_path("improved_ssm") == f"{ImprovedSSM.__module__}.{ImprovedSSM.__name__}"


@pytest.mark.parametrize("name", ["d_model", "n_layers", "d_state"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        ImprovedSSM(3, **{name: 0})


def test_state_of_another_trunk_or_size_is_refused():
    trunk = ImprovedSSM(3, d_model=8)
    x, is_init = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"has no 'h', ImprovedSSM keeps 'h' \[2, 2, 64\]"):
        trunk(x, SimpleSSM(3, d_model=8).initial_state(2), is_init)
    with pytest.raises(ValueError, match=r"has 'h' \[2, 3, 64\], ImprovedSSM keeps 'h' \[2, 2, 64\]"):
        trunk(x, ImprovedSSM(3, n_layers=3).initial_state(2), is_init)
