"""Returns and advantages: numbers worked by hand, and TorchRL's functions as an oracle."""

import pytest
import torch
from torch import Tensor
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate,
    vec_generalized_advantage_estimate,
)

from lit_rl.returns import (
    discounted_return,
    explained_variance,
    generalized_advantage,
    n_step,
    running_sum,
)

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
    reward = torch.randn(3, 10, generator=random, dtype=torch.float64)
    ended = torch.rand(3, 10, generator=random) < 0.3
    start = torch.randn(3, generator=random, dtype=torch.float64)
    kept = start.clone()
    whole, carry = discounted_return(reward, ended, start, gamma=0.9)
    first, between = discounted_return(reward[:, :cut], ended[:, :cut], start, gamma=0.9)
    second, after = discounted_return(reward[:, cut:], ended[:, cut:], between, gamma=0.9)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(after, carry, rtol=1e-14, atol=1e-14)
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


# ------------------------------------------------------------------ n steps ahead


def ahead(reward, terminated, has_action, *, n: int, gamma: float = 0.5):
    """`n_step` of one stream as lists: reward, at, discount."""
    out = n_step(row(*reward), flags(*terminated), flags(*has_action), n=n, gamma=gamma)
    return tuple(part[0].tolist() for part in out)


def test_one_step_ahead() -> None:
    # t             0    1 (terminated)    2    3 (last observation of a truncated episode)    4    5
    got = ahead([1, 2, 3, 0, 5, 6], [0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1], n=1)
    # step 2 bootstraps from the inserted observation, which itself is not learnt from
    assert got == ([1.0, 2.0, 3.0, 0.0, 5.0], [1, 2, 3, 3, 5], [0.5, 0.0, 0.5, 0.0, 0.5])


def test_three_steps_ahead_within_an_episode() -> None:
    # 1 + 2/2 + 4/4 = 3 and 2 + 4/2 + 8/4 = 6, then 1/8 of the value three steps on
    got = ahead([1, 2, 4, 8, 100], [0] * 5, [1] * 5, n=3)
    assert got == ([3.0, 6.0], [3, 4], [0.125, 0.125])


def test_three_steps_ahead_through_a_termination() -> None:
    # step 2 ends its episode, k = 3, 2, 1: 1 + 2/2 + 4/4, 2 + 4/2, 4; step 3: 8 + 16/2 + 32/4 = 24
    got = ahead([1, 2, 4, 8, 16, 32, 64], [0, 0, 1, 0, 0, 0, 0], [1] * 7, n=3)
    assert got == ([3.0, 4.0, 4.0, 24.0], [3, 3, 3, 6], [0.0, 0.0, 0.0, 0.125])


def test_three_steps_ahead_through_a_truncation() -> None:
    # step 2 is the truncated episode's last observation, k = 2, 1, 0; step 3: 8 + 16/2 + 32/4 = 24
    reward, has_action = [1, 2, 0, 8, 16, 32, 64], [1, 1, 0, 1, 1, 1, 1]
    got = ahead(reward, [0] * 7, has_action, n=3)
    assert got == ([2.0, 2.0, 0.0, 24.0], [2, 2, 2, 6], [0.25, 0.5, 0.0, 0.125])
    # of a step without action neither the reward nor the flag counts
    assert ahead([1, 2, 77, 8, 16, 32, 64], [0, 0, 1, 0, 0, 0, 0], has_action, n=3) == got


def test_the_truncation_stands_where_the_look_ahead_ends() -> None:
    # step 3 is n steps on from step 0 and bootstraps it all the same
    got = ahead([1, 2, 4, 0, 16, 32], [0] * 6, [1, 1, 1, 0, 1, 1], n=3)
    assert got == ([3.0, 4.0, 4.0], [3, 3, 3], [0.125, 0.25, 0.5])


def test_consecutive_ends() -> None:
    # t             0 (one step, terminated)  1 (the same)  2, 3 (one step, truncated)  4, 5 (the same)  6 ...
    got = ahead([1, 2, 3, 0, 4, 0, 5, 6, 7], [1, 1, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 1, 0, 1, 1, 1], n=2)
    assert got[0] == [1.0, 2.0, 3.0, 0.0, 4.0, 0.0, 8.0]  # step 6: 5 + 6/2, then terminated
    assert got[1] == [1, 2, 3, 3, 5, 5, 8]
    assert got[2] == [0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0]


def test_n_longer_than_the_episodes() -> None:
    # steps 0 and 1 until terminated, 2 and 3 until truncated at 4, then 5 and 6 until terminated; n = 6
    reward, terminated = [1, 2, 4, 8, 0, 16, 32, 64, 128], [0, 1, 0, 0, 0, 0, 1, 0, 0]
    got = ahead(reward, terminated, [1, 1, 1, 1, 0, 1, 1, 1, 1], n=6)
    assert got == ([2.0, 2.0, 8.0], [2, 2, 4], [0.0, 0.0, 0.25])


def test_mistaken_ends_are_seen() -> None:
    """Negative controls: a truncation taken for a termination, or for no end, gives other numbers."""
    reward, has_action = [1, 2, 0, 8, 16, 32], [1, 1, 0, 1, 1, 1]
    truth = ahead(reward, [0] * 6, has_action, n=3)
    as_termination = ahead(reward, [0, 1, 0, 0, 0, 0], has_action, n=3)
    no_end = ahead(reward, [0] * 6, [1] * 6, n=3)
    assert (truth[0][:2], truth[2][:2]) == ([2.0, 2.0], [0.25, 0.5])
    assert (as_termination[0][:2], as_termination[2][:2]) == ([2.0, 2.0], [0.0, 0.0])
    assert (no_end[0][:2], no_end[2][:2]) == ([2.0, 4.0], [0.125, 0.125])  # step 1: 2 + 0/2 + 8/4


def step_by_step(reward, terminated, has_action, n: int, gamma: float):
    """The definition, read aloud, for one stream of plain numbers and one step t after the other."""
    result = []
    for t in range(len(reward) - n):
        total, discount = 0.0, 1.0
        at = t
        if not has_action[t]:
            discount = 0.0
        while discount and at < t + n and has_action[at]:
            total += discount * reward[at]
            discount = 0.0 if terminated[at] else discount * gamma
            at += 1
        result.append((total, at, discount))
    return result


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("ends", [0.0, 0.1, 0.5])
def test_n_step_agrees_with_a_loop(n: int, ends: float) -> None:
    random = torch.Generator().manual_seed(n)
    N, T = 20, 30
    reward = torch.randn(N, T, generator=random, dtype=torch.float64)
    terminated, no_action = torch.rand(2, N, T, generator=random) < ends
    given = (reward, terminated, ~no_action)
    copies = [tensor.clone() for tensor in given]
    out = n_step(*given, n=n, gamma=0.9)
    assert out.at.dtype == torch.int64
    expected = [step_by_step(*(x.tolist() for x in stream), n, 0.9) for stream in zip(*given, strict=True)]
    for part, theirs in zip(out, torch.tensor(expected, dtype=torch.float64).unbind(-1), strict=True):
        torch.testing.assert_close(part.double(), theirs, rtol=1e-12, atol=1e-12)
    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_n_step_keeps_the_dtype_and_takes_gamma_0() -> None:
    reward, at, discount = n_step(
        torch.tensor([[1.0, 2.0, 3.0]]), flags(0, 0, 0), flags(1, 1, 1), n=2, gamma=0.0
    )
    assert (reward.tolist(), at.tolist(), discount.tolist()) == ([[1.0]], [[2]], [[0.0]])
    assert reward.dtype == discount.dtype == torch.float32


@pytest.mark.parametrize("n", [0, 4])
def test_n_step_of_too_short_a_stream(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n} for a stream of 3 steps: it must be from 1 to 3"):
        ahead([1, 2, 3], [0, 0, 0], [1, 1, 1], n=n)


def test_values_of_a_chain_are_the_fixed_point_of_any_n() -> None:
    """Three states, reward 1 each, then terminated: V = 1.75, 1.5, 1; a truncated walk has the same ones."""
    # first walk: states 0 1 2, terminated; second: 0 1, truncated in 2 (no action there); third: 0 1 2
    state = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]])
    terminated, has_action = flags(0, 0, 1, 0, 0, 0, 0, 0, 1), flags(1, 1, 1, 1, 1, 0, 1, 1, 1)
    value = torch.tensor([1.75, 1.5, 1.0], dtype=torch.float64)[state]
    for n in (1, 2, 3, 5):
        reward, at, discount = n_step(has_action.double(), terminated, has_action, n=n, gamma=0.5)
        target = reward + discount * value.gather(1, at)
        learnt = has_action[:, :-n]
        assert torch.equal(target[learnt], value[:, :-n][learnt])
        ignoring = n_step(has_action.double(), terminated, torch.ones_like(has_action), n=n, gamma=0.5)
        wrong = ignoring.reward + ignoring.discount * value.gather(1, ignoring.at)
        assert n == 1 or not torch.equal(wrong[learnt], value[:, :-n][learnt])


@pytest.mark.parametrize("T", [1, 2, 3, 7, 64, 1000])
def test_running_sums_are_those_of_a_loop(T: int) -> None:
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(3, T, generator=generator, dtype=torch.float64)
    weight = torch.rand(3, T, generator=generator, dtype=torch.float64)
    weight[:, ::5] = 0.0
    before = x.clone(), weight.clone()
    expected, y = [], torch.zeros(3, dtype=torch.float64)
    for t in range(T):
        y = x[:, t] + weight[:, t] * y
        expected.append(y)
    torch.testing.assert_close(running_sum(x, weight), torch.stack(expected, 1), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])
