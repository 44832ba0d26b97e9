"""The trunk `mingru` keeps lit_rl's contract, computes minGRU's recurrence, and its name leads to it."""

import math

import pytest
import torch
from lit_rl_mingru import MinGRU, linear_scan, positive

from lit_rl import registry
from lit_rl.testing import TrunkConformance

torch.set_num_threads(1)


class TestMinGRU(TrunkConformance):
    trunk = MinGRU
    options = ({}, {"d_model": 7, "n_layers": 3})


def test_name_leads_to_the_class():
    assert registry.class_path("mingru") == f"{MinGRU.__module__}.{MinGRU.__name__}"


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 21])
def test_scan_equals_the_loop(steps):
    keep_BTD, write_BTD = torch.rand(2, steps, 3).double(), torch.randn(2, steps, 3).double()
    keep_BTD[0, steps // 2] = 0
    h_BD = torch.randn(2, 3).double()
    found_BTD = linear_scan(keep_BTD, write_BTD, h_BD)
    for t in range(steps):
        h_BD = keep_BTD[:, t] * h_BD + write_BTD[:, t]
        torch.testing.assert_close(found_BTD[:, t], h_BD, rtol=0, atol=1e-12)


def test_positive_is_continuous_and_positive():
    torch.testing.assert_close(positive(torch.tensor([-1e-7, 0.0, 2.0])), torch.tensor([0.5, 0.5, 2.5]))
    assert positive(torch.tensor(-20.0)) > 0


def test_two_steps_by_hand():
    trunk = MinGRU(1, d_model=1)
    for parameter in trunk.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(trunk.gates[0].bias, math.log(3))  # z = 3/4
    torch.nn.init.constant_(trunk.candidates[0].bias, 1.5)  # h~ = 2
    state = trunk.initial_state(1)
    state["h"] += 4
    y, _ = trunk(torch.zeros(1, 3, 1), state, torch.tensor([[False, False, True]]))
    # 4/4 + 6/4 = 2.5, then 2.5/4 + 6/4 = 2.125, then after the reset 6/4.
    torch.testing.assert_close(y.flatten(), torch.tensor([2.5, 2.125, 1.5]))
