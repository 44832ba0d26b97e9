"""What a batched environment is here: the contract between `envs/` and the collector.

Every environment that `EnvConfig.make` returns is a `gymnasium.vector.VectorEnv` of N rows such that:

- `reset(seed=None) -> (obs, {})`. The first reset uses the seed given to `make`, unless it is given one.
- `step(actions) -> (obs, reward, terminated, truncated, info)` with `reward` float [N], `terminated` and
  `truncated` bool [N]. `actions` is an array of `action_space`'s shape.
- A row that ends is reset within the same step: its `obs` is the first observation of the next episode, and
  no step is ever spent on a reset.
- `info` is empty (falsy) unless a row ended, `terminated | truncated`. Then it holds
    - `info["final_obs"]`: the last observations of the ended episodes, in the form of `obs`, all N rows; only
      the ended rows mean something;
    - `info["success"]`: float [N], 1 or 0 for the ended rows whose environment tells it, else NaN. The key is
      absent when no ended row tells.
- `obs` is an array [N, ...], or a dict of such arrays for `Dict` spaces. Floating observations are float32;
  images are uint8 and channel-first. Arrays returned are the caller's to keep.
- An environment that raises comes out as `UserError` with its id, its row and its step count.
- `spec` has its id, and as `max_episode_steps` the steps after which an episode is truncated, if known.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv, VectorWrapper

from lit_rl.envs.checks import cause_of, check_observation, check_scalars
from lit_rl.errors import UserError

if TYPE_CHECKING:
    from lit_rl.envs.config import EnvConfig

Obs = Any  # array [N, ...], or dict of such arrays
StepResult = tuple[Obs, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


def map_leaves(fn: Callable[..., Any], obs: Obs, *others: Obs) -> Obs:
    """`fn` of each array of an observation (the array itself, or each entry of the dict)."""
    if isinstance(obs, dict):
        return {key: fn(value, *(other[key] for other in others)) for key, value in obs.items()}
    return fn(obs, *others)


def replace_rows(obs: Obs, rows: np.ndarray, new: Obs) -> Obs:
    """A copy of `obs` with the rows where `rows` (bool [N]) is true taken from `new`."""

    def replace(old_leaf: np.ndarray, new_leaf: np.ndarray) -> np.ndarray:
        out = old_leaf.copy()
        out[rows] = new_leaf[rows]
        return out

    return map_leaves(replace, obs, new)


def base_seed(seed: int) -> int:
    """Where the seeds of the rows start: row i takes `base_seed(seed) + i`.

    Rows seeded with `seed + i` themselves would make neighbouring seeds share all rows but one.
    """
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 2)  # room for + i within int32


def derived_seed(*numbers: int) -> int:
    """A seed that other numbers give only by chance."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) % 2**31


class GuardedEnv(gym.Wrapper):
    """One row: an exception names its environment, and `info` is dropped but for the success at the end.

    What the first reset and the first step return is held to the environment's own spaces.
    Vector environments merge the info dictionaries of all rows at every step; dropping them here, before
    they are merged or sent between processes, is what makes an ordinary step cheap.
    """

    def __init__(self, env: gym.Env, env_id: str, index: int) -> None:
        super().__init__(env)
        self.env_id, self.index, self.steps = env_id, index, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict]:
        try:
            obs, _ = self.env.reset(seed=seed, options=options)
            if not self.steps:
                check_observation(self.observation_space, obs)
        except Exception as exc:
            raise env_fault(exc, self.env_id, f"environment {self.index}", "reset", self.steps) from exc
        return obs, {}

    def step(self, action: Any) -> tuple[Obs, Any, bool, bool, dict[str, Any]]:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            if not self.steps:
                check_observation(self.observation_space, obs)
                check_scalars(reward=reward, terminated=terminated, truncated=truncated)
            if terminated or truncated:
                told = {key: float(value) for key, value in success_of(info).items()}
            else:
                told = {}
        except Exception as exc:
            raise env_fault(exc, self.env_id, f"environment {self.index}", "step", self.steps) from exc
        self.steps += 1
        return obs, reward, terminated, truncated, told


def env_fault(exc: Exception, env_id: str, where: str, call: str, steps: int) -> UserError:
    """The one line for an environment that raised, or returned what it must not, after `steps` steps."""
    return UserError(
        f"{env_id}: {where} failed in {call}() after {steps} steps ({cause_of(exc)}); "
        "the fault is in the environment or its options: fix it, then resume from the last checkpoint"
    )


def success_of(info: dict[str, Any]) -> dict[str, Any]:
    """`is_success` (Stable-Baselines3, Gymnasium-Robotics) or `success` (Meta-World), if `info` has it."""
    for key in ("is_success", "success"):
        if key in info:
            return {"success": info[key]}
    return {}


def spec_of(config: "EnvConfig", limit: int | None) -> EnvSpec:
    """A batch's name for messages, and after how many steps its episodes are truncated, if that is known."""
    return EnvSpec(config.id.rpartition(":")[2], max_episode_steps=config.time_limit or limit)


class FirstSeed(VectorWrapper):
    """The first reset takes the seed given here, unless it is given one."""

    def __init__(self, env: VectorEnv, seed: int | None = None) -> None:
        super().__init__(env)
        self._first_seed = seed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict]:
        seed, self._first_seed = (self._first_seed if seed is None else seed), None
        obs, _ = self.env.reset(seed=None if seed is None else base_seed(seed), options=options)
        return obs, {}


class SameStepVectorEnv(FirstSeed):
    """Brings gymnasium's vector environment of `GuardedEnv`s (SAME_STEP autoreset) to the contract."""

    def step(self, actions: Any) -> StepResult:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        if not info:
            return obs, reward, terminated, truncated, info
        final_obs = map_leaves(np.copy, obs)
        for row in np.flatnonzero(terminated | truncated):
            if isinstance(final_obs, dict):
                for key, value in info["final_obs"][row].items():
                    final_obs[key][row] = value
            else:
                final_obs[row] = info["final_obs"][row]
        told = info["final_info"]
        info = {"final_obs": final_obs}
        if "success" in told:
            info["success"] = np.where(told["_success"], told["success"], np.nan)
        return obs, reward, terminated, truncated, info
