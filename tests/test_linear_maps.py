"""`linear` against torch's own, where oneDNN does it and where it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lit_rl import linear_maps
from lit_rl.trunks import Linear, linear

needs_onednn = pytest.mark.skipif(not linear_maps.HAS_ONEDNN, reason="no AVX-512 or no oneDNN here")


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def by_onednn(y: Tensor) -> bool:
    """Whether the last step of autograd, or the one before a view, is the product of `linear_maps`."""
    node = y.grad_fn
    names = [node.name(), node.next_functions[0][0].name()] if node is not None else []
    return any("_Linear" in name for name in names)


@needs_onednn
@pytest.mark.parametrize(("features", "width"), [(96, 256), (256, 96)], ids=["wider", "narrower"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_in_float64(features: int, width: int, with_bias: bool) -> None:
    x, weight, bias, grad = tensors((4, 50, features), (width, features), (width,), (4, 50, width))
    inputs = [x, weight, bias] if with_bias else [x, weight]
    y = linear(*inputs)
    assert by_onednn(y)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = F.linear(*doubles)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)
    found = torch.autograd.grad(y, inputs, grad)
    for one, other in zip(found, torch.autograd.grad(expected, doubles, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-4)


@needs_onednn
def test_tensors_of_any_layout() -> None:
    x, weight, bias, grad = tensors((96, 4, 100), (256, 192), (512,), (4, 1, 256))
    strided = [x.permute(1, 2, 0), weight[:, ::2], bias[::2]]
    y = linear(*strided)
    assert by_onednn(y)
    expected = F.linear(*strided)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)
    found = torch.autograd.grad(y, [x, weight, bias], grad.expand_as(y))
    for one, other in zip(
        found, torch.autograd.grad(expected, [x, weight, bias], grad.expand_as(y)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@needs_onednn
@pytest.mark.parametrize("shape", [(1,), (1, 256)])
def test_biases_of_other_shapes_are_as_torch_has_them(shape: tuple[int, ...]) -> None:
    x, weight, bias = tensors((200, 128), (256, 128), shape)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=1e-4)


@needs_onednn
def test_shapes_that_do_not_fit_are_refused_by_torch() -> None:
    x, weight = tensors((200, 128), (256, 127))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, weight)


@needs_onednn
def test_functional_transforms_find_torchs_own() -> None:
    x, weight = tensors((200, 128), (256, 128))
    of_weight = torch.func.grad(lambda w: linear(x, w).square().sum())(weight)
    torch.testing.assert_close(of_weight, 2 * F.linear(x, weight).t() @ x, rtol=1e-4, atol=1e-2)


@needs_onednn
def test_forward_mode_goes_the_way_of_torch() -> None:
    x, weight = tensors((200, 128), (256, 128))
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x.detach(), x.detach()), weight))
    torch.testing.assert_close(tangent, y)


@needs_onednn
def test_gradients_can_be_differentiated() -> None:
    x, weight = tensors((200, 128), (256, 128))
    inputs = [x, weight]

    def second(product: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = product(x, weight)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().mean() for g in first), inputs)

    for one, other in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@needs_onednn
def test_what_it_does_not_suit_goes_the_way_of_torch() -> None:
    (x, weight), (few,) = tensors((200, 128), (256, 128)), tensors((2, 128))
    assert by_onednn(linear(x, weight))
    assert not by_onednn(linear(few, weight))
    assert not by_onednn(linear(x.double(), weight.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert not by_onednn(y)


@needs_onednn
def test_only_asked_for_gradients_are_made() -> None:
    x, weight, bias = tensors((200, 128), (256, 128), (256,))
    linear(x.detach(), weight, bias).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    assert bias.grad is not None


def test_module_is_nn_linear() -> None:
    torch.manual_seed(0)
    ours = Linear(128, 256)
    theirs = torch.nn.Linear(128, 256)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 80, 128)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
