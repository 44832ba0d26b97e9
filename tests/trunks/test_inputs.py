"""Inputs that do not fit are refused, before loops without bounds or operations that broadcast have them."""

import pytest
import torch
from helpers import installed_trunks, small

from lit_rl.trunks import Trunk

F, B, T = 5, 2, 6
TAKES_ANYTHING = {"mlp", "mingru"}  # no loop of theirs goes over states


@pytest.fixture(params=sorted(set(installed_trunks()) - TAKES_ANYTHING))
def trunk(request: pytest.FixtureRequest) -> Trunk:
    return small(request.param)(F)


@pytest.mark.parametrize("shape", [(1, T), (B, 1), (B, T + 2), (B, T, 1), (T,)])
def test_resets_of_another_shape_are_refused(trunk: Trunk, shape: tuple[int, ...]) -> None:
    is_init = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"is_init is \[.*\], not \[2, 6\] like x") as refusal:
        trunk(torch.randn(B, T, F), trunk.initial_state(B), is_init)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_of_other_rows_is_refused(trunk: Trunk, rows: int) -> None:
    is_init = torch.zeros(B, T, dtype=torch.bool)
    is_init[0, 3] = True
    with pytest.raises(ValueError, match=rf"the state given has '\w+' \[{rows}.*keeps '\w+' \[2"):
        trunk(torch.randn(B, T, F), trunk.initial_state(rows), is_init)


def test_a_state_of_another_width_is_refused(trunk: Trunk) -> None:
    narrow = trunk.initial_state(B)
    key, entry = next((key, entry) for key, entry in narrow.items() if entry.ndim > 1)
    narrow[key] = entry[..., :-1]
    for steps in (1, T):
        is_init = torch.zeros(B, steps, dtype=torch.bool)
        with pytest.raises(ValueError, match=f"the state given has '{key}' "):
            trunk(torch.randn(B, steps, F), narrow, is_init)
