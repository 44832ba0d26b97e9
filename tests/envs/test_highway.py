"""highway-env and EnvPool's port of it: the same contract, options, ends, dynamics and returns.

What a test of a few seconds cannot tell stands under `logs/benchmarks/highway`.
"""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lit_rl.benchmarks.highway_agreement import (
    FASTER,
    IDLE,
    POLICIES,
    RIGHT,
    SLOWER,
    always,
    from_the_same_start,
    play,
    z_of,
)
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError
from lit_rl.models.encoder import Encoder

torch.set_num_threads(1)
FAST = EnvConfig("highway-fast-v0", num_envs=1)
BACKENDS = ["gymnasium", "envpool"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("env_id", ["highway-fast-v0", "highway-v0"])
def test_both_backends_keep_the_contract(env_id: str, backend: str) -> None:
    config = EnvConfig(env_id, num_envs=2, backend=backend)
    env = config.make(seed=0)
    assert env.single_observation_space == spaces.Box(-np.inf, np.inf, (5, 5), np.float32)
    assert env.single_action_space == spaces.Discrete(5)
    assert config.spaces() == (env.single_observation_space, env.single_action_space)
    obs, _ = env.reset()
    for _ in range(2):
        assert obs in env.observation_space
        assert np.abs(obs).max() <= 1
        assert (obs[:, 0, 0] == 1).all()  # the ego vehicle
        assert (np.diff(np.abs(obs[:, 1:, 1]), axis=1) >= 0).all()  # the others, the nearest first
        obs, reward, terminated, truncated, _ = env.step(np.full(2, SLOWER))
        assert ((reward >= 0) & (reward <= 1)).all()
        assert terminated.dtype == truncated.dtype == np.bool_
    env.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_gives_the_same_episode_again(backend: str) -> None:
    first, again = (play(replace(FAST, backend=backend), POLICIES["random"], 1, seed=3) for _ in range(2))
    assert first.reward == again.reward
    np.testing.assert_array_equal(first.mean_obs, again.mean_obs)


def test_observations_are_encoded() -> None:
    encoder = Encoder(FAST.spaces()[0])
    assert encoder(torch.zeros(2, 3, 5, 5)).shape == (2, 3, 25)


# ---------------------------------------------------------------------- ends


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", [{"time_limit": 3}, {"kwargs": {"config": {"duration": 3}}}])
def test_the_limit_truncates(limit: dict[str, Any], backend: str) -> None:
    found = play(replace(FAST, backend=backend, **limit), always(SLOWER), 2, seed=0)
    assert found.length.tolist() == [3, 3]
    assert found.truncated.all()
    assert not found.terminated.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_time_limit_takes_the_place_of_a_shorter_duration(backend: str) -> None:
    config = {"duration": 3, "vehicles_count": 1, "policy_frequency": 5}
    longer = replace(FAST, backend=backend, time_limit=20, kwargs={"config": config})
    assert play(longer, always(SLOWER), 1, seed=0).length == 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_crash_terminates_also_in_the_last_step(backend: str) -> None:
    config = replace(FAST, backend=backend)
    crash = play(config, always(FASTER), 1, seed=0)
    assert (crash.terminated, crash.truncated) == (True, False)
    length = int(crash.length[0])
    at_the_limit = play(replace(config, time_limit=length), always(FASTER), 1, seed=0)
    assert (at_the_limit.terminated, at_the_limit.truncated) == (True, True)
    assert at_the_limit.reward == pytest.approx(crash.reward)
    before = play(replace(config, time_limit=length - 1), always(FASTER), 1, seed=0)
    assert (before.terminated, before.truncated) == (False, True)


# ---------------------------------------------------------------------- agreement


def test_an_episode_from_the_same_start_is_the_same_to_its_end() -> None:
    """The negative control is the pool as it is, where some drivers overtake on the other side."""
    adapted, plain = (
        from_the_same_start(FAST.id, "always right", 2, 8, mirrored) for mirrored in (True, False)
    )
    assert adapted["steps"] > 10
    assert adapted["other course"] == adapted["other kind of end"] == 0
    assert plain["other course"] > 0


REWARDS: list[dict[str, Any]] = [
    {},
    {"right_lane_reward": 0.5, "reward_speed_range": [15, 35]},
    {"normalize_reward": False, "high_speed_reward": 1},
    {"lanes_count": 1},
]


@pytest.mark.parametrize("options", REWARDS, ids=str)
def test_an_empty_road_pays_the_same(options: dict[str, Any]) -> None:
    """Without traffic nothing is random but where the ego vehicle starts, and that is not paid."""
    lanes = options.get("lanes_count", 3)
    empty = {"vehicles_count": 0, "duration": 6, "initial_lane_id": 0, **options}
    paid = []
    for backend in BACKENDS:
        env = replace(FAST, backend=backend, kwargs={"config": empty}).make(seed=0)
        first, _ = env.reset()
        assert first[0, 0, 2] == 0  # the leftmost lane
        trace = [env.step(np.array([action])) for action in (RIGHT, FASTER, RIGHT, IDLE, SLOWER)]
        assert trace[-1][0][0, 0, 2] == pytest.approx((lanes - 1) / lanes, abs=0.02)  # the rightmost
        paid.append([float(step[1][0]) for step in trace])
        env.close()
    np.testing.assert_allclose(paid[0], paid[1], atol=1e-6)


def test_returns_agree_and_another_policy_does_not() -> None:
    """Bounds for a false alarm in thousands; `faster` crashes, `slower` seldom does."""
    pool = replace(FAST, backend="envpool", num_envs=20)
    ours, theirs = play(FAST, always(FASTER), 12, seed=0), play(pool, always(FASTER), 400, seed=1)
    assert abs(z_of(ours.reward, theirs.reward)) < 4
    assert abs(z_of(ours.length, theirs.length)) < 4
    assert abs(z_of(ours.reward, play(pool, always(SLOWER), 400, seed=1).reward)) > 8


# ---------------------------------------------------------------------- refusals

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"id": "roundabout-v0", "backend": "envpool"}, ["EnvPool's roundabout-v0", "env.backend: gymnasium"]),
    ({"kwargs": {"config": {"vehicle_count": 3}}}, ["no vehicle_count", "vehicles_count"]),
    ({"backend": "envpool", "kwargs": {"config": {"vehicle_count": 3}}}, ["no vehicle_count"]),
    ({"backend": "envpool", "kwargs": {"config": {"duration": 2.5}}}, ["duration is 2.5", "int"]),
    (
        {"backend": "envpool", "kwargs": {"config": {"initial_lane_id": 3}}},
        ["initial_lane_id is 3", "most 2"],
    ),
    ({"backend": "envpool", "kwargs": {"vehicles_count": 3}}, ["vehicles_count", "config"]),
    ({"kwargs": {"vehicles_count": 3}}, ["vehicles_count", "env.kwargs"]),
    (
        {"backend": "envpool", "time_limit": 3, "kwargs": {"config": {"policy_frequency": 2}}},
        ["env.time_limit is 3", "policy_frequency"],
    ),
    ({"id": "highway-fast-v7"}, ["highway-fast-v0"]),
]


@pytest.mark.parametrize(("options", "parts"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_what_cannot_be_is_one_line(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        EnvConfig(**{"id": "highway-fast-v0", "num_envs": 1} | options).make()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highway_env", None)  # importing it raises ImportError
    with pytest.raises(UserError, match="pip install 'lit-rl\\[highway\\]'") as caught:
        EnvConfig("merge-v0").make()
    assert "\n" not in str(caught.value)


def test_the_port_needs_no_highway_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highway_env", None)
    replace(FAST, backend="envpool").make().close()
