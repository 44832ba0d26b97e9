"""The `highway-env` package, and EnvPool's port of two of its environments put right.

`env.kwargs` is `config`, highway-env's own configuration, on both backends; `env.time_limit` takes the place
of its `duration`. EnvPool 1.2.5 has most of the ids, but the traffic of its merge, roundabout, exit and so on
is not highway-env's, and mostly starts every episode in the same places. `highway-v0` and `highway-fast-v0`
agree; the rest is refused. Played from the same start, these two differ from highway-env 1.12 in

- where a driver goes who would gain in both neighbouring lanes: left, and in highway-env right. All else is
  alike on both sides of the road, so the port is seen in a mirror, `MirroredPool`;
- a crash in the last step: truncated only. Here it is terminated as well;
- to which side a crash pushes a vehicle that drives right behind another, in the mirror. It shows in the last
  observation of an episode that is terminated, is never learnt from, and stays as it is.

`python -m lit_rl.benchmarks.highway_agreement` measures what is left.

Shapes: N rows, V observed vehicles (the ego vehicle first), F features: presence, x, y, vx, vy.
"""

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from lit_rl.errors import UserError, check_range

if TYPE_CHECKING:
    from lit_rl.envs.config import EnvConfig

PORTED = ("highway-v0", "highway-fast-v0")
OPTIONS = {  # what highway-env's configuration and EnvPool's options have in common
    "lanes_count": int,
    "vehicles_count": int,
    "vehicles_density": float,
    "initial_lane_id": int,
    "ego_spacing": float,
    "duration": int,  # seconds
    "simulation_frequency": int,
    "policy_frequency": int,
    "collision_reward": float,
    "right_lane_reward": float,
    "high_speed_reward": float,
    "reward_speed_range": list,
    "normalize_reward": bool,
    "offroad_terminal": bool,
}
SWAPPED = np.array([2, 1, 0, 3, 4])  # lane left, idle, lane right, faster, slower: left and right exchanged
MIRROR_F = np.array([1, 1, -1, 1, -1], dtype=np.float32)
LANE_WIDTH = 4.0  # metres


def make_highway(config: "EnvConfig", options: dict[str, Any]) -> gym.Env:
    """One environment of the `highway-env` package."""
    env = gym.make(config.id, max_episode_steps=config.time_limit, disable_env_checker=True, **options)
    simulator: Any = env.unwrapped
    known = simulator.default_config()
    unknown = set(options.get("config") or {}) - set(known)
    if unknown:  # highway-env would take them without a word
        raise UserError(
            f"env.kwargs.config: {config.id} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}"
        )
    if config.time_limit is not None:
        simulator.configure({"duration": config.time_limit / simulator.config["policy_frequency"]})
    return env


class HighwayPort:
    """EnvPool's options for a configuration, and the pool that they make as highway-env's environment.

    Raises:
        UserError: EnvPool's is another environment, or does not take these options.
    """

    def __init__(self, config: "EnvConfig") -> None:
        from envpool import make_spec

        if config.id not in PORTED:
            raise UserError(
                f"EnvPool's {config.id} is not highway-env's (only {' and '.join(PORTED)} are): "
                "choose env.backend: gymnasium"
            )
        chosen = _chosen(config)
        self.wanted = make_spec(config.id).config._asdict() | chosen
        if config.time_limit is not None:
            chosen["duration"] = _seconds(config.time_limit, self.wanted["policy_frequency"])
        lanes, lane = self.wanted["lanes_count"], self.wanted["initial_lane_id"]
        check_range({"env.kwargs.config.initial_lane_id": lane}, -1, lanes - 1)
        self.options: dict[str, Any] = chosen | {
            "initial_lane_id": lane if lane == -1 else lanes - 1 - lane,
            "right_lane_reward": -self.wanted["right_lane_reward"],
            "normalize_reward": False,
        }

    def adapt(self, pool: Any) -> "MirroredPool":
        return MirroredPool(pool, self.wanted)


def _chosen(config: "EnvConfig") -> dict[str, Any]:
    """`env.kwargs.config` in EnvPool's names."""
    if not set(config.kwargs) <= {"config"}:
        raise UserError(
            f"env.kwargs of {config.id}: {sorted(config.kwargs)} is not [config]: write its entries there"
        )
    chosen = {key: value for key, value in config.kwargs.get("config", {}).items() if value is not None}
    for key, value in chosen.items():
        if key not in OPTIONS:
            raise UserError(
                f"env.kwargs.config: EnvPool's {config.id} has no {key}: choose env.backend: gymnasium"
            )
        if not isinstance(value, (OPTIONS[key], int)):
            raise UserError(
                f"env.kwargs.config: {key} is {value!r}, and EnvPool takes {OPTIONS[key].__name__}"
            )
    if "reward_speed_range" in chosen:
        chosen["reward_speed_low"], chosen["reward_speed_high"] = map(float, chosen.pop("reward_speed_range"))
    return chosen


def _seconds(time_limit: int, policy_frequency: int) -> int:
    check_range({"env.kwargs.config.policy_frequency": policy_frequency}, 1)
    if time_limit % policy_frequency:
        raise UserError(
            f"env.time_limit is {time_limit}: EnvPool ends episodes at whole seconds, and takes multiples of "
            f"policy_frequency, {policy_frequency}"
        )
    return time_limit // policy_frequency


class MirroredPool:
    """EnvPool's highway with left and right exchanged, under the interface of a pool.

    The pool is told to pay `-right_lane_reward` for its own lanes and not to scale. In the lanes of this side
    that is `right_lane_reward (lane / last lane - 1)`, so that a constant and the scale are missing.
    """

    def __init__(self, pool: Any, wanted: dict[str, Any]) -> None:
        self._pool, self._wanted = pool, wanted
        self.observation_space, self.action_space = pool.observation_space, pool.action_space
        self._lanes = wanted["lanes_count"]

    def reset(self, *rows: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        obs_NVF, info = self._pool.reset(*rows)
        return self._observation(obs_NVF), info

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        obs_NVF, reward, terminated, truncated, info = self._pool.step(SWAPPED[actions])
        obs_NVF = self._observation(obs_NVF)
        y_N = obs_NVF[:, 0, 2] * LANE_WIDTH * self._lanes  # the middle of the leftmost lane is 0
        on_road = (y_N >= -LANE_WIDTH / 2) & (y_N <= LANE_WIDTH * (self._lanes - 0.5))
        failed = info["crashed"] | (self._wanted["offroad_terminal"] & ~on_road)
        return obs_NVF, self._reward(reward) * on_road, terminated | failed, truncated, info

    def close(self) -> None:
        self._pool.close()

    def _observation(self, obs_NVF: np.ndarray) -> np.ndarray:
        obs_NVF = obs_NVF * MIRROR_F + np.float32(0)  # an absent vehicle's -0 becomes 0
        obs_NVF[:, 0, 2] += (self._lanes - 1) / self._lanes  # the others' y is relative to the ego vehicle's
        return obs_NVF

    def _reward(self, reward: np.ndarray) -> np.ndarray:
        wanted = self._wanted
        reward = reward + (wanted["right_lane_reward"] if self._lanes > 1 else 0.0)
        if not wanted["normalize_reward"]:
            return reward
        worst, best = wanted["collision_reward"], wanted["high_speed_reward"] + wanted["right_lane_reward"]
        return (reward - worst) / (best - worst)
