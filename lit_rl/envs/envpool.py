"""The EnvPool backend (an extra): the whole batch is stepped in C++.

What differs from gymnasium and is put right here:

- EnvPool resets a row on the step after its end and ignores that step's action. The ended rows alone are
  reset at once, so that no such step is ever seen.
- Its seed is 42 unless given, and can be given at construction only: none becomes a random one, and a seeded
  reset builds the pool again.
- Atari: sticky actions, the start of the game and the frame stack are set as the ids `ALE/...-v5` have them.
- Highway: options, the side of lane changes and the kind of end; see `lit_rl.envs.highway`.
- Box2D: the smallest positive number stands where the lower bound should be minus infinity.
- MiniGrid: a smaller `agent_view_size` crashes the process; `lit_rl.envs.minigrid` crops on every backend.
- Rendering MuJoCo without OpenGL ends the process: rendering is refused.

What stays: an episode that terminates exactly at its time limit is reported as truncated only.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lit_rl.envs.checks import cause_of, is_atari, is_highway, is_minigrid, unknown_id
from lit_rl.envs.highway import HighwayPort
from lit_rl.envs.minigrid import NATIVE_VIEW, symbolic_space
from lit_rl.envs.vector import Obs, StepResult, base_seed, env_fault, map_leaves, spec_of, success_of
from lit_rl.envs.wrappers import is_floating, leaf_spaces, map_space
from lit_rl.errors import UserError

if TYPE_CHECKING:
    from lit_rl.envs.config import EnvConfig

ATARI_OPTIONS = {"stack_num": 1, "repeat_action_probability": 0.25, "use_fire_reset": False}


def make_envpool(config: "EnvConfig", num_envs: int, seed: int | None, render_mode: str | None) -> VectorEnv:
    """`num_envs` rows of `config.id`, under the contract of `vector`."""
    if render_mode is not None:
        raise UserError(
            "EnvPool cannot render safely: choose env.backend: gymnasium to see or record episodes"
        )
    try:
        import envpool
    except ImportError as exc:
        raise UserError(
            f"env.backend: envpool needs an extra ({exc}): pip install 'lit-rl[envpool]'"
        ) from exc
    task_id = config.id.removeprefix("ALE/")
    known = envpool.list_all_envs()
    if task_id not in known:
        raise unknown_id(config.id, known, "envpool")
    options: dict[str, Any] = {"num_threads": default_threads(num_envs)}
    if is_highway(config.id):
        port = HighwayPort(config)
        env = EnvPoolVectorEnv(task_id, num_envs, seed, options | port.options, port.adapt)
        env.spec = spec_of(config, port.wanted["duration"] * port.wanted["policy_frequency"])
        return env
    if is_atari(config.id):
        options |= ATARI_OPTIONS
    options |= config.kwargs
    if config.time_limit is not None:
        options["max_episode_steps"] = config.time_limit
    env = EnvPoolVectorEnv(task_id, num_envs, seed, options)
    own = envpool.make_spec(task_id).config.max_episode_steps
    env.spec = spec_of(config, options.get("max_episode_steps", own))
    return env


def default_threads(num_envs: int) -> int:
    """A thread for every 8 rows, on at most half of the cores: more of them fight torch's."""
    return max(1, min(num_envs // 8, len(os.sched_getaffinity(0)) // 2))


class EnvPoolVectorEnv(VectorEnv):
    """A pool in sync mode that resets ended rows within the step; `adapt` puts right what a pool does."""

    def __init__(
        self,
        task_id: str,
        num_envs: int,
        seed: int | None,
        options: dict[str, Any],
        adapt: Callable[[Any], Any] = lambda pool: pool,
    ) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self._task_id, self._options, self._adapt = task_id, options, adapt
        self._pool = self._build(seed)
        if is_minigrid(task_id):
            self.single_observation_space = symbolic_space(NATIVE_VIEW)
        else:
            self.single_observation_space = map_space(_true_bounds, self._pool.observation_space)
        self.single_action_space = _float32_box(self._pool.action_space)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._steps = 0

    def _build(self, seed: int | None) -> Any:
        from envpool import make_gymnasium

        first = int(np.random.default_rng().integers(2**30)) if seed is None else base_seed(seed)
        try:
            # batch_size is the pool's sync mode; EnvPool seeds row i with seed + i
            pool = make_gymnasium(
                self._task_id, num_envs=self.num_envs, batch_size=self.num_envs, seed=first, **self._options
            )
        except Exception as exc:
            raise UserError(
                f"{self._task_id} cannot be made by EnvPool ({cause_of(exc)}): check env.kwargs"
            ) from exc
        return self._adapt(pool)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict]:
        if seed is not None:
            self._pool.close()
            self._pool = self._build(seed)
        obs, _ = self._pool.reset()
        return self._as_declared(obs), {}

    def step(self, actions: Any) -> StepResult:
        try:
            obs, reward, terminated, truncated, pool_info = self._pool.step(actions)
        except Exception as exc:
            raise env_fault(exc, self._task_id, "EnvPool", "step", self._steps) from exc
        self._steps += 1
        obs = self._as_declared(obs)
        ended = terminated | truncated
        if not ended.any():
            return obs, reward, terminated, truncated, {}
        info = {"final_obs": obs} | {
            key: np.where(ended, value, np.nan) for key, value in success_of(pool_info).items()
        }
        return self._reset_rows(obs, np.flatnonzero(ended)), reward, terminated, truncated, info

    def _reset_rows(self, obs: Obs, rows: np.ndarray) -> Obs:
        """A copy of `obs` with the first observations of new episodes at `rows`."""
        first_obs, first_info = self._pool.reset(rows.astype(np.int32))
        where = first_info["env_id"]  # the order in which the pool answers

        def put(leaf: np.ndarray, first: np.ndarray) -> np.ndarray:
            leaf = leaf.copy()
            leaf[where] = first
            return leaf

        return map_leaves(put, obs, self._as_declared(first_obs))

    def _as_declared(self, obs: Obs) -> Obs:
        """The entries that the space names, in its types."""
        if isinstance(self.single_observation_space, spaces.Dict):
            obs = {key: obs[key] for key in self.single_observation_space.spaces}
        return map_leaves(
            lambda leaf, space: leaf.astype(space.dtype, copy=False),
            obs,
            leaf_spaces(self.single_observation_space),
        )

    def close_extras(self, **kwargs: Any) -> None:
        self._pool.close()


def _true_bounds(space: gym.Space) -> gym.Space:
    """C++'s numeric limits read as no limits."""
    if not (isinstance(space, spaces.Box) and is_floating(space)):
        return space
    limits = np.finfo(space.low.dtype)
    low = np.where(space.low == limits.tiny, -np.inf, space.low).astype(space.low.dtype)
    high = np.where(space.high == limits.max, np.inf, space.high).astype(space.high.dtype)
    return spaces.Box(low, high, dtype=low.dtype)


def _float32_box(space: Any) -> Any:
    """Action boxes are float32, as gymnasium's are."""
    if isinstance(space, spaces.Box) and space.dtype == np.float64:
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    return space
