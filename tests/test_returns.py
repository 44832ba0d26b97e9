"""Returns and advantages: numbers worked by hand, and TorchRL's functions as an oracle."""

import pytest
import torch
from torch import Tensor
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate,
    vec_generalized_advantage_estimate,
)

from lit_rl.returns import discounted_return, explained_variance, generalized_advantage

HALF = {"gamma": 0.5, "gae_lambda": 0.5}


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def flags(*at: int) -> Tensor:
    return torch.tensor([at], dtype=torch.bool)


def gae(reward, value, next_value, terminated, truncated, **options) -> tuple[list[float], list[float]]:
    advantage, target = generalized_advantage(
        row(*reward), row(*value), row(*next_value), flags(*terminated), flags(*truncated), **options
    )
    return advantage[0].tolist(), target[0].tolist()


def test_without_an_end() -> None:
    # delta = r + 0.5 v' - v:  1 + 0.5*2 - 4 = -2,  2 + 0.5*6 - 2 = 3,  0 + 0.5*8 - 6 = -2
    # backwards, times 0.25:   A2 = -2,  A1 = 3 - 0.5 = 2.5,  A0 = -2 + 0.625 = -1.375
    advantage, target = gae([1, 2, 0], [4, 2, 6], [2, 6, 8], [0, 0, 0], [0, 0, 0], **HALF)
    assert advantage == [-1.375, 2.5, -2.0]
    assert target == [2.625, 4.5, 4.0]  # advantage + value


def test_termination_stops_bootstrapping() -> None:
    # The step ends its episode; next_value 100 must not count: delta1 = 2 - 2 = 0.
    # delta0 = 1 + 0.5*2 - 4 = -2, A0 = -2 + 0.25*0; delta2 = 0 + 0.5*8 - 6 = -2, not carried into A1.
    advantage, _ = gae([1, 2, 0], [4, 2, 6], [2, 100, 8], [0, 1, 0], [0, 0, 0], **HALF)
    assert advantage == [-2.0, 0.0, -2.0]


def test_truncation_bootstraps_and_cuts_the_sum() -> None:
    # V of the true last observation is 10: delta1 = 2 + 0.5*10 - 2 = 5; A2 = -2 is not carried into A1.
    # A0 = -2 + 0.25*5 = -0.75
    advantage, _ = gae([1, 2, 0], [4, 2, 6], [2, 10, 8], [0, 0, 0], [0, 1, 0], **HALF)
    assert advantage == [-0.75, 5.0, -2.0]


def test_both_in_one_rollout_with_an_episode_of_one_step() -> None:
    # t             0     1 (truncated)   2 (one step, terminated)   3    4
    # delta0 = 1 + 0.5*2 - 1 = 1          delta1 = 1 + 0.5*4 - 2 = 1
    # delta2 = 3 - 5 = -2                 delta3 = 0 + 0.5*2 - 1 = 0    delta4 = 1 + 0.5*6 - 2 = 2
    # A4 = 2, A3 = 0 + 0.25*2 = 0.5, A2 = -2, A1 = 1, A0 = 1 + 0.25*1 = 1.25
    advantage, target = gae(
        [1, 1, 3, 0, 1], [1, 2, 5, 1, 2], [2, 4, 7, 2, 6], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], **HALF
    )
    assert advantage == [1.25, 1.0, -2.0, 0.5, 2.0]
    assert target == [2.25, 3.0, 3.0, 1.5, 4.0]


def test_truncation_at_the_last_step() -> None:
    # delta1 = 2 + 0.5*10 - 2 = 5: the same as at a running end, bootstrapped from the given next value.
    cut, _ = gae([1, 2], [4, 2], [2, 10], [0, 0], [0, 1], **HALF)
    running, _ = gae([1, 2], [4, 2], [2, 10], [0, 0], [0, 0], **HALF)
    ended, _ = gae([1, 2], [4, 2], [2, 10], [0, 1], [0, 0], **HALF)
    assert cut == running == [-0.75, 5.0]
    assert ended == [-2.0, 0.0]


def test_terminated_wins_over_truncated() -> None:
    both, _ = gae([1, 2], [4, 2], [2, 10], [0, 1], [0, 1], **HALF)
    terminated, _ = gae([1, 2], [4, 2], [2, 10], [0, 1], [0, 0], **HALF)
    assert both == terminated


def test_wrong_bootstraps_are_seen() -> None:
    """Negative controls: the two usual mistakes at a truncation change the numbers."""
    truth, _ = gae([1, 2, 0], [4, 2, 6], [2, 10, 8], [0, 0, 0], [0, 1, 0], **HALF)
    as_termination, _ = gae([1, 2, 0], [4, 2, 6], [2, 10, 8], [0, 1, 0], [0, 0, 0], **HALF)
    after_reset, _ = gae([1, 2, 0], [4, 2, 6], [2, 6, 8], [0, 0, 0], [0, 1, 0], **HALF)  # V of next column
    # delta1 is 5 by the truth, 2 - 2 = 0 as a termination, 2 + 0.5*6 - 2 = 3 from the reset's observation
    assert [truth[1], as_termination[1], after_reset[1]] == [5.0, 0.0, 3.0]


def test_lambda_zero_is_one_step_and_one_is_monte_carlo() -> None:
    one_step, _ = gae([1, 2], [4, 2], [2, 10], [0, 0], [0, 0], gamma=0.5, gae_lambda=0.0)
    assert one_step == [-2.0, 5.0]
    # 1 + 0.5*2 + 0.25*10 - 4
    _, monte_carlo = gae([1, 2], [4, 2], [2, 10], [0, 0], [0, 0], gamma=0.5, gae_lambda=1.0)
    assert monte_carlo == [4.5, 7.0]


@pytest.mark.parametrize("oracle", [generalized_advantage_estimate, vec_generalized_advantage_estimate])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_torchrl(oracle, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    N, T = 5, 40
    reward, value, next_value = torch.randn(3, N, T, generator=random, dtype=torch.float64)
    terminated, truncated = torch.rand(2, N, T, generator=random) < 0.1
    assert (terminated & truncated).any() or seed > 0  # both at once occur, too
    given = (reward, value, next_value, terminated, truncated)
    copies = [tensor.clone() for tensor in given]
    advantage, target = generalized_advantage(*given, gamma=0.97, gae_lambda=0.9)
    gamma, gae_lambda = torch.tensor([0.97, 0.9], dtype=torch.float64)  # of plain numbers it makes float32
    theirs = oracle(
        gamma,
        gae_lambda,
        value[..., None],
        next_value[..., None],
        reward[..., None],
        done=(terminated | truncated)[..., None],
        terminated=terminated[..., None],
    )
    torch.testing.assert_close(advantage, theirs[0].squeeze(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(target, theirs[1].squeeze(-1), rtol=1e-12, atol=1e-12)
    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_discounted_return_by_hand() -> None:
    # R = r + 0.5 R_before: 1 + 0.5*4 = 3, 2 + 1.5 = 3.5 (ends), 4, 0 + 2 = 2
    sums, carry = discounted_return(
        row(1, 2, 4, 0), flags(0, 1, 0, 0), torch.tensor([4.0]).double(), gamma=0.5
    )
    assert sums.tolist() == [[3.0, 3.5, 4.0, 2.0]]
    assert carry.tolist() == [2.0]


def test_discounted_return_at_an_end_leaves_nothing() -> None:
    _, carry = discounted_return(row(1, 2), flags(0, 1), torch.zeros(1).double(), gamma=0.5)
    assert carry.tolist() == [0.0]


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_discounted_return_over_split_calls(cut: int) -> None:
    random = torch.Generator().manual_seed(0)
    reward = torch.randn(3, 10, generator=random)
    ended = torch.rand(3, 10, generator=random) < 0.3
    start = torch.randn(3, generator=random)
    kept = start.clone()
    whole, carry = discounted_return(reward, ended, start, gamma=0.9)
    first, between = discounted_return(reward[:, :cut], ended[:, :cut], start, gamma=0.9)
    second, after = discounted_return(reward[:, cut:], ended[:, cut:], between, gamma=0.9)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(after, carry)
    assert torch.equal(start, kept)


def test_explained_variance() -> None:
    target = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(target + 7.0, target) == 1.0  # a bias is not counted
    assert explained_variance(torch.full((4,), 2.5), target) == 0.0
    assert explained_variance(torch.zeros(4), target) == 0.0
    # errors 0, 0, 0, 2: variance 1 over the target's 5/3
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0, 2.0]), target) == pytest.approx(0.4)
    assert explained_variance(-target, target) == -3.0
    assert explained_variance(torch.ones(4), torch.ones(4)).isnan()  # nothing to explain
