"""RMSNorm is torch's, in value and gradient."""

import pytest
import torch
from lit_rl_ssm.norm import RMSNorm
from torch import nn
from torch.nn.functional import silu

torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 4, 5)])
def test_equals_torch(shape):
    ours, torchs = RMSNorm(5).double(), nn.RMSNorm(5, eps=1e-5).double()
    with torch.no_grad():
        ours.weight.normal_()
    torchs.load_state_dict(ours.state_dict())
    x = (torch.randn(shape, dtype=torch.float64) * torch.logspace(-4, 2, 5)).requires_grad_()
    weight = torch.randn(shape, dtype=torch.float64)
    results = [
        (norm(x), *torch.autograd.grad((norm(x) * weight).sum(), [x, norm.weight])) for norm in (ours, torchs)
    ]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_another_width_is_refused():
    """Not read past its end."""
    norm, x = RMSNorm(4), torch.ones(2, 6)
    for call in (lambda: norm(x), lambda: norm.gated(x, x)):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            call()
    with pytest.raises(RuntimeError, match="must match"):
        norm.gated(torch.ones(2, 4), torch.ones(2, 3))


def test_zeros_stay_zero():
    x = torch.zeros(2, 5, requires_grad=True)
    y = RMSNorm(5)(x)
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 4, 5), (200, 5)])
def test_gated_equals_torch(shape):
    ours, torchs = RMSNorm(5).double(), nn.RMSNorm(5, eps=1e-5).double()
    with torch.no_grad():
        ours.weight.normal_()
    torchs.load_state_dict(ours.state_dict())
    x, z = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight = torch.randn(shape, dtype=torch.float64)
    results = []
    for norm, y in ((ours, ours.gated(x, z)), (torchs, torchs(x * silu(z)))):
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, z, norm.weight])))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_large_gates_neither_overflow_nor_vanish():
    x, z = torch.ones(2, 5), torch.tensor([[1e3], [-1e3]]).expand(2, 5).clone().requires_grad_()
    y = RMSNorm(5).gated(x, z)
    torch.testing.assert_close(y[0], torch.ones(5))
    assert y[1].abs().max() < 1e-30
    y.sum().backward()
    assert z.grad.isfinite().all()


def test_other_types_are_torchs():
    x = torch.randn(4, 5).bfloat16()
    norm = RMSNorm(5).bfloat16()
    assert torch.equal(norm(x), nn.functional.rms_norm(x, [5], norm.weight, 1e-5))
