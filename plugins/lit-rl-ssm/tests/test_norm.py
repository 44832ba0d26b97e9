"""RMSNorm is torch's, in value and gradient."""

import pytest
import torch
from lit_rl_ssm.norm import RMSNorm
from torch import nn

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


def test_zeros_stay_zero():
    x = torch.zeros(2, 5, requires_grad=True)
    y = RMSNorm(5)(x)
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()
