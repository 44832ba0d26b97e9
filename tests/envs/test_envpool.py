"""EnvPool against gymnasium: the same contract, and the same environments in distribution.

The statistical test is two-sided on the means of returns and of lengths of a fixed random policy, Welch's z
beyond 4: a false alarm once in 16,000 comparisons, were the seeds not fixed. Its negative controls show that
it does reject another time limit and other dynamics at these sample sizes.
"""

from dataclasses import replace

import numpy as np
import pytest
from gymnasium import spaces

from lit_rl.envs import EnvConfig
from lit_rl.envs.vector import StepResult

ALARM = 4.0
ROWS = 32
FIXED = {
    "CartPole-v1": (EnvConfig("CartPole-v1", num_envs=ROWS), 512),
    "Pendulum-v1": (EnvConfig("Pendulum-v1", num_envs=ROWS), 128),
    "MemoryS9": (EnvConfig("MiniGrid-MemoryS9-v0", num_envs=ROWS, actions=[0, 1, 2], time_limit=96), 256),
    "Hopper-v5": (EnvConfig("Hopper-v5", num_envs=ROWS), 512),
}


def episodes(config: EnvConfig, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of each row's first `count / rows` episodes, so that short ones are no likelier."""
    env = config.make(seed=seed)
    env.reset()
    rows, rng = env.num_envs, np.random.default_rng(seed)
    space = env.single_action_space
    finished: list[list[tuple[float, int]]] = [[] for _ in range(rows)]
    totals, lengths = np.zeros(rows), np.zeros(rows, dtype=int)
    while min(map(len, finished)) < count // rows:
        if isinstance(space, spaces.Box):
            actions = rng.uniform(space.low, space.high, (rows, *space.shape)).astype(np.float32)
        else:
            actions = rng.integers(0, space.n, rows)
        _, reward, terminated, truncated, info = env.step(actions)
        totals += reward
        lengths += 1
        for row in np.flatnonzero(terminated | truncated) if info else ():
            finished[row].append((float(totals[row]), int(lengths[row])))
            totals[row], lengths[row] = 0.0, 0
    env.close()
    kept = np.array([row[: count // rows] for row in finished]).reshape(-1, 2)
    return kept[:, 0], kept[:, 1]


def welch_z(one: np.ndarray, other: np.ndarray) -> float:
    """Difference of the means in its standard errors; 0 where both are the same constant."""
    difference = one.mean() - other.mean()
    error = np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    return 0.0 if difference == 0 else float(difference / max(error, 1e-12))


def disagreement(one: EnvConfig, other: EnvConfig, count: int) -> float:
    """The larger of the two |z|, of returns and of lengths."""
    pairs = zip(episodes(one, count, seed=1), episodes(other, count, seed=2), strict=True)
    return max(abs(welch_z(mine, theirs)) for mine, theirs in pairs)


@pytest.mark.parametrize("name", FIXED)
def test_a_random_policy_fares_the_same_on_both_backends(name: str) -> None:
    config, count = FIXED[name]
    assert disagreement(config, replace(config, backend="envpool"), count) < ALARM


CONTROLS = {
    "another time limit": ("MemoryS9", {"time_limit": 72}),
    "a time limit one step shorter": ("Pendulum-v1", {"time_limit": 199}),
    "another reward": ("Hopper-v5", {"kwargs": {"healthy_reward": 1.3}}),
    "other dynamics": ("Hopper-v5", {"kwargs": {"frame_skip": 6}}),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_same_test_rejects_what_differs(control: str) -> None:
    name, change = CONTROLS[control]
    config, count = FIXED[name]
    assert disagreement(config, replace(config, backend="envpool", **change), count) > ALARM


def kinematic_error(before: np.ndarray, result: StepResult) -> np.ndarray:
    """How far each row of CartPole is from Euler's x' = x + 0.02 v."""
    obs, _, _, _, info = result
    last = obs
    if info:
        last = np.where((result[2] | result[3])[:, None], info["final_obs"], obs)
    return np.abs(last[:, 0] - before[:, 0] - 0.02 * before[:, 1])


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
def test_every_step_is_a_transition(backend: str) -> None:
    """No step's action is ignored and none is spent on a reset: physics holds from every observation on."""
    env = EnvConfig("CartPole-v1", num_envs=8, backend=backend, time_limit=15).make(seed=0)
    obs, _ = env.reset()
    rng = np.random.default_rng(0)
    fresh, ends = np.ones(8, dtype=bool), 0
    for _ in range(300):
        action = rng.integers(0, 2, 8)
        result = env.step(action)
        assert kinematic_error(obs, result).max() < 1e-6
        ended = result[2] | result[3]
        # the action of an episode's first step pushes the cart, too
        went_on = fresh & ~ended
        pushed = result[0][went_on, 1] - obs[went_on, 1]
        np.testing.assert_array_equal(np.sign(pushed), 2 * action[went_on] - 1)
        assert (result[1] == 1.0).all()  # the reset step of EnvPool would pay 0
        ends += ended.sum()
        obs, fresh = result[0], ended
    assert ends > 100


def test_only_ended_rows_are_reset() -> None:
    env = EnvConfig("CartPole-v1", num_envs=16, backend="envpool").make(seed=0)
    obs, _ = env.reset()
    apart = 0
    for action in np.random.default_rng(0).integers(0, 2, (200, 16)):
        obs, _, terminated, truncated, info = env.step(action)
        ended = terminated | truncated
        assert (np.abs(obs[ended]) <= 0.05).all()
        if info:
            np.testing.assert_array_equal(info["final_obs"][~ended], obs[~ended])
            assert (np.abs(info["final_obs"][ended]).max(axis=1) > 0.2).all()
            apart += int(0 < ended.sum() < 16)
    assert apart > 50


@pytest.mark.parametrize("name", ["Pendulum-v1", "HalfCheetah-v5"])
def test_limits_truncate_and_never_terminate(name: str) -> None:
    limit = {"Pendulum-v1": None, "HalfCheetah-v5": 30}[name]
    env = EnvConfig(name, num_envs=2, backend="envpool", time_limit=limit).make(seed=0)
    env.reset()
    for step in range(1, 401):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        assert not terminated.any()
        assert truncated.all() == truncated.any() == (step % (limit or 200) == 0)


def test_cells_are_seen_in_the_same_places_on_both_backends() -> None:
    """Orientation of the view: how often each cell shows each kind of object, under one random policy."""
    shares = []
    for backend in ("gymnasium", "envpool"):
        env = EnvConfig("MiniGrid-DoorKey-5x5-v0", num_envs=ROWS, backend=backend).make(seed=0)
        obs, _ = env.reset()
        counts, rng = np.zeros((7, 7, 11)), np.random.default_rng(0)
        for _ in range(300):
            counts += np.eye(11)[obs["image"][..., 0]].sum(axis=0)
            obs = env.step(rng.integers(0, 7, ROWS))[0]
        shares.append(counts / (300 * ROWS))
    difference = np.abs(shares[0] - shares[1])
    assert difference.max() < 0.12
    mirrored = np.abs(shares[0] - shares[1].transpose(1, 0, 2))
    assert mirrored.max() > 0.5  # the negative control: columns and rows swapped
