"""The compiled loops of the MLP against torch: values, gradients, second derivatives, who is left out."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lit_rl.compiled.perceptron import (
    FEATURES_TO_TRANSPOSE,
    RELU,
    ROWS_TO_TRANSPOSE,
    TANH,
    compiled_layers,
)
from lit_rl.compiled.products import PART
from lit_rl.trunks import MLP
from lit_rl.trunks.mlp import FEW

FUNCTIONS = {TANH: torch.tanh, RELU: torch.relu}
# (N, F, D, L): few and many rows, both ways through the weight, sums over more than one part, odd sizes.
SIZES = [
    (1, 1, 1, 1),
    (3, 5, 7, 2),
    (ROWS_TO_TRANSPOSE, 4, 9, 3),
    (ROWS_TO_TRANSPOSE + 5, FEATURES_TO_TRANSPOSE + 3, 18, 2),
    (PART + 1, 6, 21, 2),
]


def parameters_of(F: int, D: int, L: int, dtype: torch.dtype = torch.float64) -> tuple[list, list]:
    sizes = [F] + [D] * L
    weights = [torch.randn(D, inner, dtype=dtype) / inner**0.5 for inner in sizes[:-1]]
    biases = [0.3 * torch.randn(D, dtype=dtype) for _ in range(L)]
    return [w.requires_grad_() for w in weights], [b.requires_grad_() for b in biases]


def by_torch(x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: int) -> Tensor:
    for weight, bias in zip(weights, biases, strict=True):
        x = FUNCTIONS[activation](x @ weight.t() + bias)
    return x


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize(("N", "F", "D", "L"), SIZES)
def test_values_and_gradients_are_those_of_torch(N: int, F: int, D: int, L: int, activation: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(N, F, dtype=torch.float64, requires_grad=True)
    weights, biases = parameters_of(F, D, L)
    inputs = [x, *weights, *biases]
    y = compiled_layers(x, weights, biases, activation)
    expected = by_torch(x, weights, biases, activation)
    grad_y = torch.randn_like(y)
    torch.testing.assert_close(y, expected, atol=1e-13, rtol=0)
    grads = torch.autograd.grad(y, inputs, grad_y)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, grad_y), atol=1e-12, rtol=0)
    with torch.no_grad():
        assert torch.equal(compiled_layers(x, weights, biases, activation), y)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_second_derivatives(activation: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights, biases = parameters_of(3, 4, 2)

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        return compiled_layers(x, parameters[:2], parameters[2:], activation)

    assert torch.autograd.gradcheck(f, (x, *weights, *biases))
    assert torch.autograd.gradgradcheck(f, (x, *weights, *biases))


@pytest.mark.parametrize("create_graph", [False, True])
def test_inputs_that_depend_on_one_another(create_graph: bool) -> None:
    """The same weights twice, in two calls and in one, and an input that is made of them."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    (W,), (b,) = parameters_of(4, 4, 1)
    cases = {
        "two calls": lambda layers: layers(layers(x, [W], [b], TANH), [W], [b], TANH),
        "one call": lambda layers: layers(x, [W, W], [b, b], TANH),
        "input": lambda layers: layers(x @ W, [W], [b], TANH),
    }
    for name, case in cases.items():
        found = torch.autograd.grad(case(compiled_layers).sum(), [W, b], create_graph=create_graph)
        expected = torch.autograd.grad(case(by_torch).sum(), [W, b])
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0, msg=name)


def test_gradients_are_asked_for_one_by_one() -> None:
    """Also where some inputs want none, with and without a second derivative."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    weights, biases = parameters_of(3, 4, 2)
    for parameter in (weights[0], biases[1]):
        parameter.requires_grad_(False)
    wanted = [biases[0], weights[1]]
    expected = torch.autograd.grad(by_torch(x, weights, biases, TANH).sum(), wanted)
    for create_graph in (False, True):
        y = compiled_layers(x, weights, biases, TANH)
        found = torch.autograd.grad(y.sum(), wanted, create_graph=create_graph)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_trunk_takes_either_way_to_the_same_numbers(activation, monkeypatch) -> None:
    torch.manual_seed(0)
    trunk = MLP(5, d_model=16, activation=activation)
    x = torch.randn(3, FEW, 5, requires_grad=True)
    results = []
    for few in (1, 10**9):  # always compiled, never
        monkeypatch.setattr("lit_rl.trunks.mlp.FEW", few)
        y, _ = trunk(x, trunk.initial_state(3), torch.zeros(3, FEW, dtype=torch.bool))
        assert ("Compiled" in str(y.grad_fn.next_functions)) == (few == 1)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trunk.parameters()])])
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)


def test_rows_that_lie_apart() -> None:
    trunk = MLP(4, d_model=8)
    x = torch.randn(FEW, 2, 8)[:, :, ::2].transpose(0, 1)
    state, is_init = trunk.initial_state(2), torch.zeros(2, FEW, dtype=torch.bool)
    torch.testing.assert_close(trunk(x, state, is_init)[0], trunk(x.contiguous(), state, is_init)[0])


def test_functional_transforms_go_by_torch() -> None:
    trunk = MLP(4, d_model=8)
    x, is_init = torch.randn(2, FEW, 4), torch.zeros(2, FEW, dtype=torch.bool)

    def total(parameters: dict[str, Tensor]) -> Tensor:
        y, _ = torch.func.functional_call(trunk, parameters, (x, trunk.initial_state(2), is_init))
        return y.square().sum()

    grads = torch.func.grad(total)(dict(trunk.named_parameters()))
    expected = torch.autograd.grad(total(dict(trunk.named_parameters())), list(trunk.parameters()))
    torch.testing.assert_close(list(grads.values()), list(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", ["input", "layer", "bias"])
def test_a_wrong_width_is_told_by_torch(fault: str) -> None:
    trunk, x = MLP(4, d_model=8), torch.randn(2, FEW, 3 if fault == "input" else 4)
    if fault == "layer":
        trunk.layers[1] = torch.nn.Linear(50, 8)
    if fault == "bias":
        trunk.layers[1].bias = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(RuntimeError, match=r"shape|size"):
        trunk(x, trunk.initial_state(2), torch.zeros(2, FEW, dtype=torch.bool))


def test_layers_without_bias() -> None:
    trunk = MLP(4, d_model=8)
    trunk.layers[1] = torch.nn.Linear(8, 8, bias=False)
    x, is_init = torch.randn(2, FEW, 4), torch.zeros(2, FEW, dtype=torch.bool)
    expected = torch.tanh(torch.tanh(trunk.layers[0](x)) @ trunk.layers[1].weight.t())
    torch.testing.assert_close(trunk(x, trunk.initial_state(2), is_init)[0], expected)


def test_forward_mode_goes_by_torch() -> None:
    trunk = MLP(4, d_model=8)
    x, is_init = torch.randn(2, FEW, 4), torch.zeros(2, FEW, dtype=torch.bool)
    direction = torch.randn_like(x)
    with torch.no_grad(), forward_ad.dual_level():
        y, _ = trunk(forward_ad.make_dual(x, direction), trunk.initial_state(2), is_init)
        slope = forward_ad.unpack_dual(y).tangent
    near = [trunk(x + step * direction, trunk.initial_state(2), is_init)[0] for step in (1e-2, -1e-2)]
    torch.testing.assert_close(slope, (near[0] - near[1]) / 2e-2, atol=1e-3, rtol=1e-2)


def test_long_sums_of_equal_terms_keep_their_digits() -> None:
    trunk, N = MLP(1, d_model=2, n_layers=1, activation="relu"), 2**17
    with torch.no_grad():
        trunk.layers[0].bias.fill_(5.0)
    y, _ = trunk(torch.zeros(1, N, 1), trunk.initial_state(1), torch.zeros(1, N, dtype=torch.bool))
    (0.1 * y).sum().backward()
    assert trunk.layers[0].bias.grad.tolist() == pytest.approx([0.1 * N] * 2, rel=1e-6)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("rows", [2, ROWS_TO_TRANSPOSE])
def test_what_is_not_a_number_stays_so_in_its_row(rows: int, activation: int) -> None:
    x = torch.ones(rows, 3)
    x[0, 0] = torch.nan
    with torch.no_grad():
        y = compiled_layers(x, [torch.ones(5, 3)], [torch.zeros(5)], activation)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()
