"""Toy environments whose right answer is known. `register` makes them gymnasium ids `lit_rl/...`.

Counter and Fault follow a script that a test can write down; Recall, Bandit, Target and Sum can be learned,
and the return of the best policy is stated.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

IDS = {
    "lit_rl/Counter-v0": "Counter",
    "lit_rl/Fault-v0": "Fault",
    "lit_rl/NaN-v0": "NaN",
    "lit_rl/Recall-v0": "Recall",
    "lit_rl/Dict-v0": "DictObservation",
    "lit_rl/MultiDiscrete-v0": "MultiDiscreteTarget",
    "lit_rl/Bandit-v0": "ContinuousBandit",
}


def register() -> None:
    """Register the ids with gymnasium; a second call changes nothing."""
    for env_id, class_name in IDS.items():
        if env_id not in gym.registry:
            gym.register(env_id, entry_point=f"{__name__}:{class_name}")


class Counter(gym.Env):
    """Observation (episode, t), both from 0; the reward of step t is `t + 1`, t being the step's start.

    Episode e lasts `lengths[e % len(lengths)]` steps and is truncated if `truncations[e % len(truncations)]`,
    else terminated. Actions change nothing.
    """

    def __init__(self, lengths: Sequence[int] = (3, 5), truncations: Sequence[bool] = (False, True)) -> None:
        self.observation_space = spaces.Box(0.0, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.lengths, self.truncations = list(lengths), list(truncations)
        self.episode, self.t = -1, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.episode = -1  # a seeded reset starts the script again
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        ended = self.t >= self.lengths[self.episode % len(self.lengths)]
        truncated = ended and self.truncations[self.episode % len(self.truncations)]
        return self._obs(), float(self.t), ended and not truncated, truncated, {}

    def _obs(self) -> np.ndarray:
        return np.array([self.episode, self.t], dtype=np.float32)


class Fault(Counter):
    """A Counter with one endless episode that raises in place of step number `after` + 1."""

    def __init__(self, after: int = 10) -> None:
        super().__init__(lengths=[2**31])
        self.after = after

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.t == self.after:
            raise RuntimeError("the simulator\nfell over")  # two lines: what reports it must make one
        return super().step(action)


class NaN(Counter):
    """A Counter with one endless episode whose observations are NaN from step number `after` + 1 on."""

    def __init__(self, after: int = 10) -> None:
        super().__init__(lengths=[2**31])
        self.after = after

    def _obs(self) -> np.ndarray:
        return np.full(2, np.nan, np.float32) if self.t > self.after else super()._obs()


class Recall(gym.Env):
    """A cue at the first step, `delay` blank steps, then the signal to answer with the cue.

    Observation, one-hot: the cues, then blank, then go. The episode lasts `delay + 2` steps; only the action
    at the last counts: reward 1 if it is the cue, else 0. With memory the return is 1, without 1 / `cues`.
    """

    def __init__(self, delay: int = 16, cues: int = 2) -> None:
        self.delay, self.cues = delay, cues
        self.observation_space = spaces.Box(0.0, 1.0, (cues + 2,), np.float32)
        self.action_space = spaces.Discrete(cues)
        self.cue, self.t = 0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cue, self.t = int(self.np_random.integers(self.cues)), 0
        return self._one_hot(self.cue), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        if self.t <= self.delay:
            return self._one_hot(self.cues), 0.0, False, False, {}
        if self.t == self.delay + 1:
            return self._one_hot(self.cues + 1), 0.0, False, False, {}
        right = int(action) == self.cue
        return self._one_hot(self.cues), float(right), True, False, {"is_success": right}

    def _one_hot(self, index: int) -> np.ndarray:
        obs = np.zeros(self.cues + 2, dtype=np.float32)
        obs[index] = 1.0
        return obs


class DictObservation(gym.Env):
    """Entries of every kind; reward 1 for the action that `symbol` names. `length` steps, then truncated.

    The best return is `length`; `position` (t / length) and `cells` are distractors.
    """

    def __init__(self, length: int = 8) -> None:
        self.length = length
        self.observation_space = spaces.Dict(
            {
                "cells": spaces.MultiDiscrete([3, 4]),
                "position": spaces.Box(0.0, 1.0, (1,), np.float32),
                "symbol": spaces.Discrete(3),
            }
        )
        self.action_space = spaces.Discrete(3)
        self.symbol, self.t = 0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict[str, Any], dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict]:
        reward = float(int(action) == self.symbol)
        self.t += 1
        return self._obs(), reward, False, self.t >= self.length, {}

    def _obs(self) -> dict[str, Any]:
        self.symbol = int(self.np_random.integers(3))
        cells = self.np_random.integers([3, 4])
        return {
            "cells": cells,
            "position": np.array([self.t / self.length], np.float32),
            "symbol": self.symbol,
        }


class MultiDiscreteTarget(gym.Env):
    """Two choices at once, of 3 and of 4: reward 1/3 if the first is right, 2/3 if the second is.

    What is right is seen, one-hot [7]. One step an episode; the best return is 1, a random policy's 5/18.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (7,), np.float32)
        self.action_space = spaces.MultiDiscrete([3, 4])
        self.target = np.zeros(2, dtype=np.int64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.target = self.np_random.integers([3, 4])
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        first, second = np.asarray(action) == self.target
        return self._obs(), (float(first) + 2.0 * float(second)) / 3.0, True, False, {}

    def _obs(self) -> np.ndarray:
        obs = np.zeros(7, dtype=np.float32)
        obs[[self.target[0], 3 + self.target[1]]] = 1.0
        return obs


class ContinuousBandit(gym.Env):
    """One step: reward `-|action - target(x)|^2` with the context x in [-1, 1] seen, target (x / 2, -x / 2).

    The best return is 0.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.context = np.zeros(1, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.context = self.np_random.uniform(-1.0, 1.0, 1).astype(np.float32)
        return self.context.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        target = self.context[0] * np.array([0.5, -0.5])
        reward = -float(np.square(np.asarray(action) - target).sum())
        return self.context.copy(), reward, True, False, {}
