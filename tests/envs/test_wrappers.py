"""Every wrapper of the batch against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from gymnasium import spaces

from lit_rl.envs import EnvConfig

NOOP = np.zeros(1, dtype=np.int64)
ONE_LENGTH = {"lengths": [3], "truncations": [False]}


def counter(**options: object) -> EnvConfig:
    return EnvConfig("lit_rl/Counter-v0", num_envs=1, kwargs=ONE_LENGTH, **options)  # type: ignore[arg-type]


def test_frame_stack_keeps_old_frames_at_the_end_and_forgets_them_after() -> None:
    env = counter(frame_stack=3).make(seed=0)
    assert env.single_observation_space.shape == (6,)
    assert env.reset()[0].tolist() == [[0, 0, 0, 0, 0, 0]]
    assert env.step(NOOP)[0].tolist() == [[0, 0, 0, 0, 0, 1]]
    assert env.step(NOOP)[0].tolist() == [[0, 0, 0, 1, 0, 2]]
    obs, _, _, _, info = env.step(NOOP)
    assert info["final_obs"].tolist() == [[0, 1, 0, 2, 0, 3]]
    assert obs.tolist() == [[1, 0, 1, 0, 1, 0]]
    assert env.step(NOOP)[0].tolist() == [[1, 0, 1, 0, 1, 1]]


def test_frame_stack_of_one_row_leaves_the_other_alone() -> None:
    plain = EnvConfig("CartPole-v1", num_envs=4)
    single, stacked = plain.make(seed=3), EnvConfig("CartPole-v1", num_envs=4, frame_stack=2).make(seed=3)
    obs, pair = single.reset()[0], stacked.reset()[0]
    ends = 0
    for action in np.random.default_rng(0).integers(0, 2, (100, 4)):
        before = obs
        obs, _, terminated, truncated, info = single.step(action)
        pair, _, _, _, pair_info = stacked.step(action)
        ended = terminated | truncated
        np.testing.assert_array_equal(pair[~ended], np.hstack([before, obs])[~ended])
        np.testing.assert_array_equal(pair[ended], np.hstack([obs, obs])[ended])
        if info:
            ends += ended.sum()
            expected = np.hstack([before, info["final_obs"]])[ended]
            np.testing.assert_array_equal(pair_info["final_obs"][ended], expected)
    assert ends > 4


def test_frame_stack_joins_images_by_channel_and_discrete_into_multi_discrete() -> None:
    observation, _ = EnvConfig("CarRacing-v3", num_envs=1, frame_stack=2).spaces()
    assert observation.shape == (6, 96, 96)
    env = EnvConfig("lit_rl/Dict-v0", num_envs=2, frame_stack=2).make(seed=0)
    leaves = env.single_observation_space.spaces
    assert leaves["symbol"] == spaces.MultiDiscrete([3, 3])
    assert leaves["cells"] == spaces.MultiDiscrete([3, 4, 3, 4])
    first = env.reset()[0]
    second = env.step(np.zeros(2, dtype=np.int64))[0]
    assert second in env.observation_space
    np.testing.assert_array_equal(second["symbol"][:, 0], first["symbol"][:, 1])


def test_delayed_reward_pays_by_the_clock_and_at_the_end() -> None:
    env = counter(reward_delay=2).make(seed=0)
    env.reset()
    paid = [float(env.step(NOOP)[1][0]) for _ in range(6)]
    assert paid == [0, 1 + 2, 3, 0, 1 + 2, 3]  # rewards 1, 2, 3 an episode
    env.step(NOOP)
    env.reset()  # what was unpaid is forgotten
    assert float(env.step(NOOP)[1][0]) == 0
    assert float(env.step(NOOP)[1][0]) == 3


def test_noise_has_its_size_and_leaves_whole_numbers_alone() -> None:
    env = EnvConfig("lit_rl/Counter-v0", num_envs=2000, observation_noise=0.5, kwargs=ONE_LENGTH).make(seed=0)
    first = env.reset()[0]
    second, _, _, _, _ = env.step(np.zeros(2000, dtype=np.int64))
    noise = np.stack([first, second - [0, 1]])
    assert abs(noise.std() - 0.5) < 0.02  # 8000 numbers: 5 standard errors
    assert abs(noise.mean()) < 0.03
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.08
    assert second in env.observation_space
    assert second.dtype == np.float32
    mixed = EnvConfig("lit_rl/Dict-v0", num_envs=4, observation_noise=0.5).make(seed=0).reset()[0]
    assert mixed["symbol"].dtype == np.int64
    assert mixed["position"].std() > 0


def test_noise_is_on_the_last_observation_too() -> None:
    env = counter(observation_noise=0.5).make(seed=0)
    env.reset()
    for _ in range(2):
        env.step(NOOP)
    final = env.step(NOOP)[4]["final_obs"]
    assert final.tolist() != [[0, 3]]
    np.testing.assert_allclose(final, [[0, 3]], atol=2.5)


def angle(obs: np.ndarray, cos: int) -> np.ndarray:
    return np.unwrap(np.arctan2(obs[:, cos + 1], obs[:, cos]))


# positions as functions of the observations [T, D], and the indices of their velocities
MOTION = {
    "CartPole-v1": ([lambda obs: obs[:, 0], lambda obs: obs[:, 2]], [1, 3]),
    "Pendulum-v1": ([lambda obs: angle(obs, 0)], [2]),
    "Acrobot-v1": ([lambda obs: angle(obs, 0), lambda obs: angle(obs, 2)], [4, 5]),
    "MountainCar-v0": ([lambda obs: obs[:, 0]], [1]),
    "MountainCarContinuous-v0": ([lambda obs: obs[:, 0]], [1]),
    "LunarLander-v3": ([lambda obs: obs[:, 0], lambda obs: obs[:, 1], lambda obs: obs[:, 4]], [2, 3, 5]),
}
MOTION["LunarLanderContinuous-v3"] = MOTION["LunarLander-v3"]


@pytest.mark.parametrize("env_id", MOTION)
def test_what_is_masked_is_what_positions_move_by(env_id: str) -> None:
    """The masked entries are velocities: they correlate with the differences of the positions."""
    positions, velocities = MOTION[env_id]
    env = EnvConfig(env_id, num_envs=1, actions=[0] if env_id == "Acrobot-v1" else None).make(seed=0)
    seen = [env.reset()[0][0]]
    for _ in range(40):
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated[0] or truncated[0]:
            break
        seen.append(obs[0])
    track = np.array(seen)
    for position, velocity in zip(positions, velocities, strict=True):
        moved = np.diff(position(track))
        speed = (track[1:, velocity] + track[:-1, velocity]) / 2
        assert np.corrcoef(moved, speed)[0, 1] > 0.95
    kept = [index for index in range(track.shape[1]) if index not in velocities]
    masked = EnvConfig(env_id, num_envs=1, mask_velocity=True).make(seed=0)
    np.testing.assert_array_equal(masked.reset()[0][0], track[0, kept])
    assert masked.single_observation_space.shape == (len(kept),)


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
@pytest.mark.parametrize("env_id", MOTION)
def test_mask_is_the_same_on_every_observation_of_both_backends(env_id: str, backend: str) -> None:
    config = EnvConfig(env_id, num_envs=2, backend=backend, time_limit=5)
    full, masked = config.make(seed=4), replace(config, mask_velocity=True).make(seed=4)
    velocities = MOTION[env_id][1]

    def without_velocities(obs: np.ndarray) -> np.ndarray:
        return np.delete(obs, velocities, axis=1)

    np.testing.assert_array_equal(masked.reset()[0], without_velocities(full.reset()[0]))
    for _ in range(5):
        action = full.action_space.sample()
        all_seen, seen = full.step(action), masked.step(action)
        np.testing.assert_array_equal(seen[0], without_velocities(all_seen[0]))
    np.testing.assert_array_equal(seen[4]["final_obs"], without_velocities(all_seen[4]["final_obs"]))


def test_chosen_actions_are_the_environments_own() -> None:
    chosen = EnvConfig("CartPole-v1", num_envs=2, actions=[1]).make(seed=0)
    plain = EnvConfig("CartPole-v1", num_envs=2).make(seed=0)
    assert chosen.single_action_space == spaces.Discrete(1)
    chosen.reset()
    plain.reset()
    for _ in range(5):
        one = chosen.step(np.zeros(2, dtype=np.int64))[0]
        np.testing.assert_array_equal(one, plain.step(np.ones(2, dtype=np.int64))[0])


def test_standard_form_is_float32_and_channel_first() -> None:
    cheetah = EnvConfig("HalfCheetah-v5", num_envs=2).make(seed=0)
    assert cheetah.single_observation_space.dtype == np.float32
    assert cheetah.reset()[0].dtype == np.float32
    racing = EnvConfig("CarRacing-v3", num_envs=1).make(seed=0)
    obs = racing.reset()[0]
    assert obs.shape == (1, 3, 96, 96)
    assert obs in racing.observation_space
