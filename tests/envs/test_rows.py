"""Rows in one process, against environments that write into the arrays they return and receive."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from lit_rl import keys
from lit_rl.collectors import RolloutCollector
from lit_rl.envs.gymnasium import _SyncRows
from lit_rl.envs.vector import FirstSeed, GuardedEnv
from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.trunks import MLP

torch.set_num_threads(1)


class Reuses(gym.Env):
    """Counts to 3 in one array that it always returns, and spoils every action it gets."""

    observation_space = gym.spaces.Box(0, 9, (2,), np.float32)
    action_space = gym.spaces.MultiDiscrete([3, 3])

    def __init__(self) -> None:
        self.count = np.zeros(2, np.float32)

    def reset(self, **_: Any) -> tuple[np.ndarray, dict]:
        self.count[:] = 0
        return self.count, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.count += 1
        action -= 7
        return self.count, 1.0, False, bool(self.count[0] == 3), {}


def rows() -> FirstSeed:
    makers = [lambda index=index: GuardedEnv(Reuses(), "Reuses", index) for index in range(2)]
    return FirstSeed(_SyncRows(makers, autoreset_mode=AutoresetMode.SAME_STEP))


def test_the_last_observation_outlives_the_reset() -> None:
    env = rows()
    env.reset(seed=0)
    actions = np.ones((2, 2), np.int64)
    for count in (1, 2):
        obs, *_, info = env.step(actions.copy())
        assert obs.tolist() == [[count, count]] * 2
        assert info == {}
    obs, _, terminated, truncated, info = env.step(actions)
    assert obs.tolist() == [[0, 0]] * 2
    assert info["final_obs"].tolist() == [[3, 3]] * 2
    assert truncated.all()
    assert not terminated.any()
    assert "success" not in info


def test_the_rollout_keeps_the_actions_that_were_taken() -> None:
    agent = ActorCritic(Reuses.observation_space, Reuses.action_space, MLP)
    rollout = RolloutCollector(rows, agent, frames_per_batch=20).rollout()
    action = rollout[keys.STEPS, keys.ACTION]
    assert action.min() >= 0
    assert action.max() < 3


class Faulty(gym.Env):
    """Right until step `at`, which returns what it is told."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, space: gym.Space, right: Any, wrong: dict[str, Any], at: int) -> None:
        self.observation_space, self.right, self.wrong, self.at, self.t = space, right, wrong, at, 0

    def reset(self, **_: Any) -> tuple[Any, dict]:
        return self.wrong.get("obs", self.right) if self.at == 0 else self.right, {}

    def step(self, action: int) -> tuple[Any, Any, Any, Any, dict]:
        self.t += 1
        told = {"obs": self.right, "reward": 1.0, "terminated": False, "truncated": False, "info": {}}
        obs, reward, terminated, truncated, info = (told | (self.wrong if self.t == self.at else {})).values()
        return obs, reward, terminated, truncated, info


BOX = gym.spaces.Box(-1, 1, (2,), np.float32)
PAIR = gym.spaces.Dict({"a": BOX, "b": gym.spaces.Discrete(3)})
ZEROS = np.zeros(2, np.float32)
SHAPES = [
    (
        BOX,
        ZEROS,
        {"obs": np.zeros(3)},
        0,
        r"reset\(\) after 0 .*observation is float64 \[3\], its space \[2\]",
    ),
    (BOX, ZEROS, {"obs": {"a": 1}}, 0, "observation is object"),
    (BOX, ZEROS, {"obs": np.zeros((2, 1))}, 1, r"step\(\) after 0 .*\[2, 1\], its space \[2\]"),
    (BOX, ZEROS, {"obs": np.zeros(3)}, 2, r"step\(\) after 2 .*observations of \[3\], the space is \[2\]"),
    (BOX, ZEROS, {"reward": np.ones(1)}, 1, r"reward has the shape \[1\], not that of a number"),
    (BOX, ZEROS, {"terminated": np.zeros(1, bool)}, 1, r"terminated has the shape \[1\]"),
    (BOX, ZEROS, {"reward": "much"}, 2, "could not convert string to float"),
    (BOX, ZEROS, {"truncated": True, "info": {"success": "yes"}}, 2, "could not convert string to float"),
    (
        PAIR,
        {"a": ZEROS, "b": 2},
        {"obs": {"a": ZEROS}},
        0,
        r"is \['a'\], its space has the keys \['a', 'b'\]",
    ),
    (PAIR, {"a": ZEROS, "b": 2}, {"obs": ZEROS}, 0, "observation is ndarray, its space has the keys"),
    (
        PAIR,
        {"a": ZEROS, "b": 2},
        {"obs": {"a": ZEROS, "b": 3}},
        0,
        r"observation is 3, its space Discrete\(3\)",
    ),
    (PAIR, {"a": ZEROS, "b": 2}, {"obs": {"a": ZEROS}}, 2, "KeyError"),
]


@pytest.mark.parametrize(("space", "right", "wrong", "at", "message"), SHAPES)
def test_what_does_not_keep_its_own_spaces_is_named(space, right, wrong, at, message) -> None:
    """In one line, at the first step or where an array of all rows cannot be made."""
    faulty = Faulty(space, right, wrong, at)
    make = [lambda: GuardedEnv(faulty, "Faulty-v0", 0)]
    env = FirstSeed(_SyncRows(make, autoreset_mode=AutoresetMode.SAME_STEP))
    with pytest.raises(UserError, match=message) as fault:
        reset_and_step(env)
    assert str(fault.value).startswith("Faulty-v0: ")
    assert "\n" not in str(fault.value)
    assert faulty.t == at


def reset_and_step(env: FirstSeed) -> None:
    env.reset(seed=0)
    for _ in range(2):
        env.step(np.zeros(1, np.int64))
