"""Rows in one process, against environments that write into the arrays they return and receive."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from lit_rl import keys
from lit_rl.collectors import RolloutCollector
from lit_rl.envs.gymnasium import _SyncRows
from lit_rl.envs.vector import FirstSeed, GuardedEnv
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
