"""Running statistics: numpy's moments over all data, moved only when told to."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.normalization import ObservationNorm, RewardScale, RunningMoments
from lit_rl.trunks import MLP

RANDOM = np.random.default_rng(0)
DATA = (RANDOM.normal(size=(24, 3)) * [1.0, 10.0, 0.1] + [0.0, 100.0, -5.0]).astype(np.float32)


def buffers(module: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


@pytest.mark.parametrize("cuts", [[], [1], [12], [1, 2, 3, 23], list(range(1, 24))], ids=str)
def test_moments_equal_numpys_for_any_split(cuts: list[int]) -> None:
    moments = RunningMoments((3,))
    for batch in np.split(DATA, cuts):
        moments.update(torch.from_numpy(batch))
    np.testing.assert_allclose(moments.mean, DATA.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.var, DATA.astype(np.float64).var(0), rtol=1e-9)
    assert moments.count == 24


def test_leading_dimensions_are_samples() -> None:
    flat, folded = RunningMoments((3,)), RunningMoments((3,))
    flat.update(torch.from_numpy(DATA))
    folded.update(torch.from_numpy(DATA).reshape(4, 6, 3))
    assert all(map(torch.equal, buffers(flat), buffers(folded)))
    matrix = RunningMoments((2, 2))
    matrix.update(torch.arange(24.0).reshape(3, 2, 2, 2))
    assert matrix.mean.tolist() == [[10.0, 11.0], [12.0, 13.0]]


def test_small_deviations_from_a_large_mean() -> None:
    """The sum of squares minus the square of the sum would lose all digits in float32."""
    samples = 1e4 + torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)) * 1e-2
    moments = RunningMoments((1,))
    for batch in samples.split(100):
        moments.update(batch)
    np.testing.assert_allclose(moments.var, samples.numpy().astype(np.float64).var(0), rtol=1e-8)


def test_the_first_forward_is_the_identity() -> None:
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ObservationNorm((3,))(x), x)


def test_it_normalizes_and_clips() -> None:
    norm = ObservationNorm((3,), clip=2.0)
    norm.update(torch.from_numpy(DATA))
    expected = (DATA - DATA.mean(0)) / DATA.std(0)
    assert (np.abs(expected) > 2).any()
    np.testing.assert_allclose(norm(torch.from_numpy(DATA)), expected.clip(-2, 2), atol=1e-4)


def test_a_constant_feature_stays_finite() -> None:
    norm = ObservationNorm((1,))
    norm.update(torch.full((8, 1), 3.0))
    assert norm(torch.full((1, 1), 3.0)).item() == 0.0
    assert norm(torch.full((1, 1), 4.0)).item() == 10.0  # clipped


def test_statistics_stand_still_unless_updated() -> None:
    norm = ObservationNorm((3,))
    norm.update(torch.from_numpy(DATA))
    before = buffers(norm)
    norm(torch.randn(10, 3))
    norm.train()(torch.randn(10, 3))
    norm.eval()
    assert all(map(torch.equal, before, buffers(norm)))
    norm.update(torch.zeros(1, 3))
    assert not any(map(torch.equal, before, buffers(norm)))


def test_statistics_are_in_the_state_dict() -> None:
    norm, copy = ObservationNorm((3,)), ObservationNorm((3,))
    norm.update(torch.from_numpy(DATA))
    copy.load_state_dict(norm.state_dict())
    for module in (norm, copy):
        module.update(torch.ones(2, 3))
    assert all(map(torch.equal, buffers(norm), buffers(copy)))


def test_reward_scale() -> None:
    scale = RewardScale(clip=3.0)
    assert scale(torch.tensor([1.0, -2.0])).tolist() == [1.0, -2.0]  # before the first update
    returns = torch.tensor([[1.0, 3.0], [5.0, 7.0]])  # mean 4, variance 5; only the variance counts
    scale.update(returns)
    reward = torch.tensor([2.0, -2.0, 100.0])
    scaled = scale(reward)
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == pytest.approx([2 / 5**0.5, -2 / 5**0.5, 3.0])
    assert reward.tolist() == [2.0, -2.0, 100.0]


def test_the_agent_normalizes_the_continuous_parts_only() -> None:
    space = spaces.Dict(
        {
            "kind": spaces.Discrete(3),
            "picture": spaces.Box(0, 255, (1, 36, 36), np.uint8),
            "type": spaces.Box(-np.inf, np.inf, (3,)),
        }
    )
    agent = ActorCritic(space, spaces.Discrete(2), MLP, normalize_observation=True)
    observation = {
        "kind": torch.tensor([[0, 1, 2, 2]]),
        "picture": torch.zeros(1, 4, 1, 36, 36, dtype=torch.uint8),
        "type": torch.from_numpy(DATA[None, :4]),
    }
    agent.update_normalization(observation)
    assert agent.normalized == ("type",)
    seen = agent._normalize(observation)
    assert seen["kind"] is observation["kind"]
    assert seen["picture"] is observation["picture"]
    expected = (DATA[:4] - DATA[:4].mean(0)) / DATA[:4].std(0)
    np.testing.assert_allclose(seen["type"][0], expected, atol=1e-3)
    np.testing.assert_array_equal(observation["type"], DATA[None, :4])  # nothing changed in place
