"""The causal convolution, compiled and not: one pass, steps and chunks, gradients, no tap across a reset.

Shapes: B rows, T time steps, D channels, W taps.
"""

from functools import partial

import pytest
import torch
from lit_rl_ssm.convolution import causal_convolution
from torch.nn.functional import silu

torch.set_num_threads(1)

B, T, D, W = 3, 11, 5, 4


@pytest.fixture(params=[True, False], ids=["compiled", "tensor operations"])
def convolution(request):
    return partial(causal_convolution, compiled=request.param)


def step_by_step(x_BTD, weight_DW, bias_D, state_BDP, is_init_BT):
    """The definition, one row and one step at a time."""
    y_BTD, last = [], []
    for x_TD, window, is_init_T in zip(x_BTD, state_BDP.unbind(0), is_init_BT, strict=True):
        outputs = []
        for x_D, is_init in zip(x_TD, is_init_T, strict=True):
            if is_init:
                window = torch.zeros_like(window)
            taps_DW = torch.cat([window, x_D[:, None]], dim=1)
            outputs.append(silu((taps_DW * weight_DW).sum(dim=1) + bias_D))
            window = taps_DW[:, 1:]
        y_BTD.append(torch.stack(outputs))
        last.append(window)
    return torch.stack(y_BTD), torch.stack(last)


def inputs(steps=T, width=W):
    generator = torch.Generator().manual_seed(steps)
    shapes = ([B, steps, D], [D, width], [D], [B, D, width - 1])
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def some_resets(steps, rate):
    return torch.rand(B, steps, generator=torch.Generator().manual_seed(7)) < rate


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize(("steps", "width"), [(1, 4), (2, 4), (3, 4), (T, 4), (T, 2), (T, 1)])
def test_equals_the_definition(convolution, steps, width, rate):
    tensors, is_init_BT = inputs(steps, width), some_resets(steps, rate)
    results = [f(*tensors, is_init_BT) for f in (convolution, step_by_step)]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = [torch.randn_like(tensor) for tensor in results[0]]
    totals = [sum((w * r).sum() for w, r in zip(weights, result, strict=True)) for result in results]
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = [torch.autograd.grad(total, tensors, **options) for total in totals]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * T, [2, 1, 5, 3], [10, 1]])
def test_passes_join(convolution, sizes):
    x_BTD, weight_DW, bias_D, state_BDP = inputs()
    is_init_BT = some_resets(T, 0.3)
    whole, last = convolution(x_BTD, weight_DW, bias_D, state_BDP, is_init_BT)
    parts = []
    for x, is_init in zip(x_BTD.split(sizes, 1), is_init_BT.split(sizes, 1), strict=True):
        y, state_BDP = convolution(x, weight_DW, bias_D, state_BDP, is_init)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state_BDP, last, rtol=0, atol=1e-12)


def test_without_resets_it_is_torch_convolution(convolution):
    x_BTD, weight_DW, bias_D, state_BDP = inputs()
    found, last = convolution(x_BTD, weight_DW, bias_D, state_BDP, some_resets(T, 0.0))
    window_BDS = torch.cat([state_BDP, x_BTD.transpose(1, 2)], dim=2)
    expected = silu(torch.conv1d(window_BDS, weight_DW[:, None], bias_D, groups=D)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, window_BDS[:, :, -(W - 1) :])


def test_a_reset_matters(convolution):
    """Negative control: the same numbers without the reset are others."""
    tensors, is_init_BT = inputs(), torch.zeros(B, T, dtype=torch.bool)
    without, _ = convolution(*tensors, is_init_BT)
    is_init_BT[:, 5] = True
    found, _ = convolution(*tensors, is_init_BT)
    differs_T = (found != without).any(dim=2).any(dim=0)
    assert differs_T.nonzero().flatten().tolist() == [5, 6, 7]


def test_many_steps_in_float32_keep_their_digits():
    """Gradients of weights are sums over all steps."""
    generator = torch.Generator().manual_seed(0)
    steps, is_init_BT = 4096, torch.zeros(B, 4096, dtype=torch.bool)
    shapes = ([B, steps, D], [D, W], [D], [B, D, W - 1])
    exact = [1 + torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes]
    gradients = []
    for dtype in (torch.float32, torch.float64):
        tensors = [tensor.to(dtype, copy=True).requires_grad_() for tensor in exact]
        y, _ = causal_convolution(*tensors, is_init_BT)
        gradients.append(torch.autograd.grad(y.sum(), tensors))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)
