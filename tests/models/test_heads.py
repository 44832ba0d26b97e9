"""Policy heads, held to torch.distributions."""

from math import log

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as D

from lit_rl.errors import UserError
from lit_rl.models.heads import policy_head

FEATURES = 5
BOX = spaces.Box(np.array([-1.0, -3.0], np.float32), np.array([1.0, 5.0], np.float32))


def head_and_params(space: spaces.Space, *batch: int, seed: int = 0, **options):
    """A head whose distributions are far from uniform, and their parameters for a random batch."""
    torch.manual_seed(seed)
    head = policy_head(FEATURES, space, **options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
        return head, head(torch.randn(*batch, FEATURES))


def entropy_of(head, params: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        action = head.sample(params)
    return head.log_prob_and_entropy(params, action)[1]


def many(params: torch.Tensor, n: int) -> torch.Tensor:
    """The parameters of one distribution, n times."""
    return params.flatten()[None].expand(n, -1)


# ------------------------------------------------------------------ discrete


def test_categorical_agrees_with_torch() -> None:
    head, params = head_and_params(spaces.Discrete(4), 6, 3)
    oracle = D.Categorical(logits=params)
    action = torch.randint(4, (6, 3))
    torch.testing.assert_close(head.log_prob(params, action), oracle.log_prob(action))
    torch.testing.assert_close(entropy_of(head, params), oracle.entropy())
    assert torch.equal(head.mode(params), oracle.probs.argmax(-1))
    assert head.sample(params).shape == (6, 3)
    assert head.sample(params).dtype == head.action_dtype


def test_multidiscrete_is_a_product() -> None:
    sizes = [2, 5, 3]
    head, params = head_and_params(spaces.MultiDiscrete(sizes), 6, 3)
    factors = [D.Categorical(logits=part) for part in params.split(sizes, -1)]
    action = torch.stack([factor.sample() for factor in factors], -1)
    expected = sum(factor.log_prob(a) for factor, a in zip(factors, action.unbind(-1), strict=True))
    torch.testing.assert_close(head.log_prob(params, action), expected)
    torch.testing.assert_close(entropy_of(head, params), sum(factor.entropy() for factor in factors))
    assert torch.equal(head.mode(params), torch.stack([factor.probs.argmax(-1) for factor in factors], -1))
    sampled = head.sample(params)
    assert sampled.shape == (6, 3, 3) == (6, 3, *head.action_shape)
    assert (sampled < torch.tensor(sizes)).all()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_gradients_of_log_probability_and_entropy_agree_with_torch(is_compiled, monkeypatch) -> None:
    monkeypatch.setattr("lit_rl.models.heads.can_be_compiled", lambda *_: is_compiled)
    torch.manual_seed(0)
    for sizes in ([4], [2, 5, 3]):
        head = policy_head(FEATURES, spaces.MultiDiscrete(sizes) if len(sizes) > 1 else spaces.Discrete(4))
        params = torch.randn(6, 3, sum(sizes), dtype=torch.float64, requires_grad=True)
        action = head.sample(params.detach())
        weights = torch.randn(2, 6, 3, dtype=torch.float64)

        def gradient(terms, params=params, weights=weights) -> torch.Tensor:
            return torch.autograd.grad(
                sum((w * t).sum() for w, t in zip(weights, terms, strict=True)), params
            )[0]

        actions = action.unbind(-1) if len(sizes) > 1 else [action]
        factors = [D.Categorical(logits=part) for part in params.split(sizes, -1)]
        oracle_log_prob = sum(factor.log_prob(a) for factor, a in zip(factors, actions, strict=True))
        oracle = gradient((oracle_log_prob, sum(factor.entropy() for factor in factors)))
        torch.testing.assert_close(gradient(head.log_prob_and_entropy(params, action)), oracle)
        assert torch.autograd.gradcheck(head.log_prob_and_entropy, (params, action))


def test_two_equal_logits_by_hand() -> None:
    """p = 1/2: log p = -log 2 with gradient (1/2, -1/2), entropy log 2 at its top."""
    head = policy_head(FEATURES, spaces.Discrete(2))
    params = torch.zeros(1, 2, requires_grad=True)
    log_prob, entropy = head.log_prob_and_entropy(params, torch.tensor([0]))
    assert [log_prob.item(), entropy.item()] == pytest.approx([-log(2), log(2)])
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), params)
    assert gradient.flatten().tolist() == pytest.approx([0.5, -0.5])


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


def test_sampling_frequencies() -> None:
    head, params = head_and_params(spaces.Discrete(4), 1, seed=1)
    action = head.sample(many(params, 20_000), torch.Generator().manual_seed(0))
    counts = torch.bincount(action, minlength=4)
    assert counts.min() > 50  # every action occurs, or the test says little
    assert (
        chi_square(counts, params.softmax(-1).flatten()) < 16.3
    )  # 99.9 % quantile with 3 degrees of freedom
    uniform = torch.full((4,), 0.25)
    assert chi_square(counts, uniform) > 1000  # and it would see another distribution


def test_sampling_frequencies_of_a_product() -> None:
    head, params = head_and_params(spaces.MultiDiscrete([2, 3]), 1)
    action = head.sample(many(params, 20_000), torch.Generator().manual_seed(0))
    first, second = (part.softmax(-1) for part in params.flatten().split([2, 3]))
    joint = (first[:, None] * second[None, :]).flatten()
    counts = torch.bincount(action[:, 0] * 3 + action[:, 1], minlength=6)
    assert chi_square(counts, joint) < 20.5  # 99.9 %, 5 degrees of freedom; dependence would show


def test_a_start_other_than_zero() -> None:
    head, params = head_and_params(spaces.Discrete(3, start=-1), 200)
    sampled = head.sample(params)
    assert set(sampled.tolist()) == {0, 1, 2}
    assert set(head.to_env(sampled).tolist()) == {-1, 0, 1}
    head, params = head_and_params(spaces.MultiDiscrete([2, 3], start=[5, -2]), 200)
    seen = head.to_env(head.sample(params))
    assert seen.amin(0).tolist() == [5, -2]
    assert seen.amax(0).tolist() == [6, 0]


def test_multibinary() -> None:
    space = spaces.MultiBinary(3)
    head, params = head_and_params(space, 7)
    action = head.sample(params)
    oracle = D.Independent(D.Categorical(logits=params.unflatten(-1, (3, 2))), 1)
    torch.testing.assert_close(head.log_prob(params, action), oracle.log_prob(action))
    torch.testing.assert_close(entropy_of(head, params), oracle.entropy())
    assert all(space.contains(row.numpy().astype(space.dtype)) for row in head.to_env(action))


# ------------------------------------------------------------------ continuous


def test_gaussian_agrees_with_torch() -> None:
    head, params = head_and_params(BOX, 6, 3)
    oracle = D.Independent(D.Normal(params, head.log_std.exp()), 1)
    action = torch.randn(6, 3, 2)
    torch.testing.assert_close(head.log_prob(params, action), oracle.log_prob(action))
    torch.testing.assert_close(entropy_of(head, params), oracle.entropy())
    assert torch.equal(head.mode(params), params)


def test_gaussian_samples() -> None:
    head, params = head_and_params(BOX, 1)
    action = head.sample(many(params, 50_000), torch.Generator().manual_seed(0)).detach()
    std = head.log_std.exp()
    error = (action.mean(0) - params.flatten()) / (std / 50_000**0.5)  # in standard errors
    assert error.abs().max() < 4
    torch.testing.assert_close(action.std(0), std, rtol=0.02, atol=0)
    assert np.corrcoef(action.T)[0, 1] == pytest.approx(0.0, abs=0.02)


def test_gaussian_is_clipped_only_on_the_way_out() -> None:
    head, params = head_and_params(BOX, 1)
    action = torch.tensor([[5.0, -7.0], [0.5, 4.5]])
    assert head.to_env(action).tolist() == [[1.0, -3.0], [0.5, 4.5]]
    assert action.tolist() == [[5.0, -7.0], [0.5, 4.5]]
    oracle = D.Independent(D.Normal(params, head.log_std.exp()), 1)
    torch.testing.assert_close(head.log_prob(params, action), oracle.log_prob(action))  # of what was sampled


def test_unbounded_actions() -> None:
    head, _ = head_and_params(spaces.Box(-np.inf, np.inf, (2,)), 1)
    assert head.to_env(torch.tensor([[1e6, -1e6]])).tolist() == [[1e6, -1e6]]


def squashed(params: torch.Tensor, head) -> D.Distribution:
    low, high = torch.as_tensor(BOX.low), torch.as_tensor(BOX.high)
    stretch = D.AffineTransform((low + high) / 2, (high - low) / 2, event_dim=1)
    normal = D.Independent(D.Normal(params, head.log_std.exp()), 1)
    return D.TransformedDistribution(normal, [D.TanhTransform(cache_size=1), stretch])


def test_squashed_density_agrees_with_torch() -> None:
    head, params = head_and_params(BOX, 6, 3, squash=True)
    head, params = head.double(), params.double()
    action = torch.randn(6, 3, 2, dtype=torch.float64)
    oracle = squashed(params, head)
    torch.testing.assert_close(head.log_prob(params, action), oracle.log_prob(head.to_env(action)))


def test_squashed_density_far_out_is_finite() -> None:
    head, params = head_and_params(BOX, 1, squash=True)
    params = params.requires_grad_()
    log_prob = head.log_prob(params, torch.tensor([[40.0, -40.0]]))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert params.grad.isfinite().all()


def test_squashed_actions_stay_within_bounds() -> None:
    head, params = head_and_params(BOX, 1, squash=True)
    low, high = torch.as_tensor(BOX.low), torch.as_tensor(BOX.high)
    action = head.to_env(head.sample(many(params, 5_000)))
    assert ((action >= low) & (action <= high)).all()
    ends = head.to_env(torch.tensor([[100.0, 100.0], [-100.0, -100.0], [0.0, 0.0]]))
    torch.testing.assert_close(ends, torch.stack([high, low, (low + high) / 2]))


def test_squashed_entropy_statistically() -> None:
    head, params = head_and_params(BOX, 1, squash=True)
    n = 100_000
    torch.manual_seed(0)
    estimate = entropy_of(head, many(params, n))
    oracle = squashed(many(params, n), head)
    truth = -oracle.log_prob(oracle.sample())
    error = (estimate.mean() - truth.mean()) / ((estimate.var() + truth.var()) / n).sqrt()
    assert error.abs() < 4
    plain = entropy_of(head_and_params(BOX, 1)[0], many(params, n))
    assert (plain.mean() - truth.mean()).abs() > 0.1  # the Gaussian's own entropy is another number


def test_squashed_entropy_has_a_gradient_to_the_mean() -> None:
    """Wide tails saturate: moving the mean outwards loses entropy."""
    head, _ = head_and_params(BOX, 1, squash=True)
    params = torch.tensor([[2.0, -2.0]]).expand(20_000, 2).clone().requires_grad_()
    entropy_of(head, params).mean().backward()
    assert params.grad[:, 0].sum() < 0 < params.grad[:, 1].sum()


# ------------------------------------------------------------------ all heads


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.MultiDiscrete([2, 4]), BOX], ids=repr)
def test_samples_follow_the_generator(space: spaces.Space, squash: bool) -> None:
    head, params = head_and_params(space, 50, squash=squash)

    def draw(seed: int) -> torch.Tensor:
        return head.sample(params, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_new_policy_is_close_to_uniform() -> None:
    head = policy_head(FEATURES, spaces.Discrete(4))
    entropy = entropy_of(head, head(torch.randn(100, FEATURES)))
    assert (entropy > log(4) - 1e-3).all()
    head = policy_head(FEATURES, BOX, log_std=-0.5)
    assert head.log_std.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(
    ("space", "options"),
    [
        (spaces.Text(5), {}),
        (spaces.Tuple([spaces.Discrete(2)]), {}),
        (spaces.Dict({"a": spaces.Discrete(2)}), {}),
        (spaces.MultiDiscrete([[2, 2], [2, 2]]), {}),
        (spaces.MultiBinary([2, 2]), {}),
        (spaces.Box(-1, 1, (2, 2)), {}),
        (spaces.Box(-1, 1, ()), {}),
        (spaces.Box(0, 255, (2,), np.uint8), {}),
        (spaces.Box(-np.inf, np.inf, (2,)), {"squash": True}),
        (spaces.Box(-np.inf, np.arange(40, dtype=np.float32)), {"squash": True}),
    ],
    ids=str,
)
def test_unsupported_spaces_are_one_line(space: spaces.Space, options: dict) -> None:
    with pytest.raises(UserError) as error:
        policy_head(FEATURES, space, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
