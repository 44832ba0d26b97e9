"""The contract of `lit_rl.envs.vector`, on a script that can be written down."""

import numpy as np
import pytest

from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError

NOOP = np.zeros(2, dtype=np.int64)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_steps_and_resets_follow_the_script(vectorization: str) -> None:
    """Episodes of 2 steps (terminated) and 3 steps (truncated), alternating."""
    options = {"lengths": [2, 3], "truncations": [False, True]}
    config = EnvConfig("lit_rl/Counter-v0", num_envs=2, vectorization=vectorization, kwargs=options)
    env = config.make(seed=0)
    obs, info = env.reset()
    assert obs.tolist() == [[0, 0], [0, 0]]
    assert info == {}
    # per step: observation after it, reward, terminated, truncated, true last observation
    script = [
        ([0, 1], 1, False, False, None),
        ([1, 0], 2, True, False, [0, 2]),
        ([1, 1], 1, False, False, None),
        ([1, 2], 2, False, False, None),
        ([2, 0], 3, False, True, [1, 3]),
        ([2, 1], 1, False, False, None),
        ([3, 0], 2, True, False, [2, 2]),
    ]
    for expected, paid, ends, cut, last in script:
        obs, reward, terminated, truncated, info = env.step(NOOP)
        assert obs.dtype == np.float32
        assert obs.tolist() == [expected] * 2
        assert reward.tolist() == [paid] * 2
        assert terminated.tolist() == [ends] * 2
        assert truncated.tolist() == [cut] * 2
        if last is None:
            assert info == {}
        else:
            assert info.keys() == {"final_obs"}
            assert info["final_obs"].tolist() == [last] * 2
    env.close()


def test_final_obs_of_one_row_leaves_the_other_alone() -> None:
    config = EnvConfig("CartPole-v1", num_envs=2)
    env = config.make(seed=0)
    obs, _ = env.reset()
    for _ in range(100):
        before = obs
        obs, _, terminated, truncated, info = env.step(NOOP)
        ended = terminated | truncated
        last = info["final_obs"] if info else obs
        # Euler's position, also through the end: x' = x + 0.02 v
        np.testing.assert_allclose(last[:, 0], before[:, 0] + 0.02 * before[:, 1], atol=1e-6)
        assert (np.abs(obs[ended]) <= 0.05).all()
        if ended.any() and not ended.all():
            return
    pytest.fail("both rows always ended together: the seed tests nothing")


def test_arrays_are_the_callers_to_keep() -> None:
    env = EnvConfig("lit_rl/Dict-v0", num_envs=2).make(seed=0)
    obs, _ = env.reset()
    kept = [(obs, {key: value.copy() for key, value in obs.items()})]
    for _ in range(20):
        obs, _, _, _, info = env.step(NOOP)
        for seen in [obs, info["final_obs"]] if info else [obs]:
            kept.append((seen, {key: value.copy() for key, value in seen.items()}))
    for seen, copy in kept:
        for key in copy:
            np.testing.assert_array_equal(seen[key], copy[key])


def test_success_is_told_at_the_end_only() -> None:
    config = EnvConfig("lit_rl/Recall-v0", num_envs=64, kwargs={"delay": 1, "cues": 4})
    env = config.make(seed=0)
    cue = env.reset()[0][:, :4].argmax(axis=1)
    answer = np.where(np.arange(64) % 2 == 0, cue, (cue + 1) % 4)  # every second row is wrong
    assert env.step(answer)[4] == {}
    assert env.step(answer)[4] == {}
    _, reward, terminated, _, info = env.step(answer)
    assert terminated.all()
    assert info["success"].tolist() == [1.0, 0.0] * 32
    assert reward.tolist() == [1.0, 0.0] * 32


def test_success_is_nan_for_rows_that_go_on() -> None:
    env = EnvConfig("MiniGrid-Empty-Random-6x6-v0", num_envs=4, actions=[0, 1, 2]).make(seed=0)
    env.reset()
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(400):
        _, reward, terminated, truncated, info = env.step(rng.integers(0, 3, 4))
        ended = terminated | truncated
        assert bool(info) == ended.any()
        if info:
            told += ended.sum()
            np.testing.assert_array_equal(np.isnan(info["success"]), ~ended)
            np.testing.assert_array_equal(info["success"][ended], reward[ended] > 0)
    assert told > 0


def trajectory(config: EnvConfig, seed: int, steps: int = 60) -> np.ndarray:
    """What one seed gives: all observations under a fixed sequence of actions."""
    env = config.make(seed=seed)
    actions = np.random.default_rng(0).integers(0, 2, (steps, config.num_envs))
    seen = [env.reset()[0]] + [env.step(action)[0] for action in actions]
    env.close()
    return np.array(seen)


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
def test_one_seed_is_one_trajectory(backend: str) -> None:
    config = EnvConfig("CartPole-v1", num_envs=4, backend=backend, observation_noise=0.1)
    first = trajectory(config, seed=1)
    np.testing.assert_array_equal(first, trajectory(config, seed=1))
    neighbour = trajectory(config, seed=2)
    # no row of a neighbouring seed repeats another row of this one
    assert all(not np.allclose(first[0, i], neighbour[0, j]) for i in range(4) for j in range(4))
    env = config.make(seed=1)
    np.testing.assert_array_equal(env.reset()[0], first[0])
    np.testing.assert_array_equal(env.reset(seed=2)[0], neighbour[0])
    assert not np.array_equal(env.reset()[0], neighbour[0])  # the next one goes on, it does not start again
    assert not np.array_equal(config.make().reset()[0], config.make().reset()[0])  # no seed is a random one


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_fault_names_environment_row_and_step(vectorization: str) -> None:
    config = EnvConfig("lit_rl/Fault-v0", num_envs=2, vectorization=vectorization, kwargs={"after": 3})
    env = config.make(seed=0)
    env.reset()
    for _ in range(3):
        env.step(NOOP)
    with pytest.raises(UserError) as caught:
        env.step(NOOP)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("lit_rl/Fault-v0", "after 3 steps", "RuntimeError: the simulator fell over"):
        assert part in message
    if vectorization == "sync":
        assert "environment 0" in message
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_nan_toy_gives_nan_when_it_says() -> None:
    env = EnvConfig("lit_rl/NaN-v0", num_envs=2, kwargs={"after": 2}).make()
    env.reset()
    finite = [bool(np.isfinite(env.step(NOOP)[0]).all()) for _ in range(4)]
    assert finite == [True, True, False, False]
