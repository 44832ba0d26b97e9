"""Softplus against torch's, over the whole range, and its gradient."""

import pytest
import torch
import torch.nn.functional as F
from lit_rl_ssm.softplus import FEW, softplus

WIDE = torch.cat([torch.linspace(-100, 100, 20_001), torch.tensor([-0.0, 0.0, 1e-30, -1e-30])])


def test_by_hand():
    many = torch.tensor([0.0, -20.0]).repeat_interleave(FEW)
    assert softplus(many)[0].item() == pytest.approx(0.6931472)  # log 2
    assert softplus(many)[-1].item() == pytest.approx(2.0611536e-9)  # exp(-20), and not 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)])
def test_small_results_are_as_exact_as_large_ones(dtype: torch.dtype, tolerance: float):
    x = WIDE.to(dtype, copy=True).requires_grad_()
    exact = WIDE.double()
    expected = exact.clamp_min(0) + torch.log1p(torch.exp(-exact.abs()))
    y = softplus(x)
    assert y.dtype == dtype
    normal = expected > torch.finfo(torch.float32).tiny  # below it float32 has fewer digits
    assert ((y.double() - expected).abs() / expected)[normal].max() < tolerance
    y.sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.sigmoid(), rtol=4e-7, atol=1e-37)


def test_any_layout():
    """And gradients that lie apart, or in one place."""
    x = torch.randn(40, 60).mT.requires_grad_()
    for grad in (torch.randn(40, 60).mT, torch.tensor(2.0).expand(60, 40)):
        expected = torch.autograd.grad(F.softplus(x), x, grad)
        torch.testing.assert_close(softplus(x), F.softplus(x))
        torch.testing.assert_close(torch.autograd.grad(softplus(x), x, grad), expected)


def test_extremes():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(FEW)
    torch.testing.assert_close(softplus(x), F.softplus(x), equal_nan=True)


def test_other_types_are_torchs():
    x = torch.randn(2 * FEW).bfloat16()
    assert torch.equal(softplus(x), F.softplus(x))
