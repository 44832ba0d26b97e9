"""Wrappers of the batch, in numpy, shared by all backends. Each treats `final_obs` as it treats `obs`.

N rows; a leaf is an observation array, or one entry of a dict observation. Where a wrapper keeps something
along the episode (frames, unpaid reward), it forgets it at the episode's end.
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from lit_rl.envs.vector import Obs, StepResult, map_leaves, replace_rows
from lit_rl.errors import UserError

VELOCITY_FREE = {  # the indices that stay, by the name of the id without its version
    "CartPole": [0, 2],  # position, angle
    "Pendulum": [0, 1],  # cos, sin
    "Acrobot": [0, 1, 2, 3],  # cos and sin of both joints
    "MountainCar": [0],  # position
    "MountainCarContinuous": [0],
    "LunarLander": [0, 1, 4, 6, 7],  # x, y, angle, contact of the left and the right leg
    "LunarLanderContinuous": [0, 1, 4, 6, 7],
}


def leaf_spaces(space: gym.Space) -> Any:
    """A space in the form of its observations: the leaf, or a dict of leaves."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else space


def map_space(fn: Callable[[gym.Space], gym.Space], space: gym.Space) -> gym.Space:
    """The space whose leaves are `fn` of the leaves of `space`."""
    mapped = map_leaves(fn, leaf_spaces(space))
    return spaces.Dict(mapped) if isinstance(mapped, dict) else mapped


def any_leaf(fn: Callable[[gym.Space], bool], space: gym.Space) -> bool:
    """Whether `fn` is true of some leaf of `space`."""
    return any(map(fn, space.spaces.values())) if isinstance(space, spaces.Dict) else fn(space)


def is_floating(space: gym.Space) -> bool:
    """Whether a leaf holds floating numbers."""
    return isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)


class ObservationTransform(VectorWrapper):
    """A function of each observation alone: `transform` of `obs` and of `final_obs`."""

    def __init__(self, env: VectorEnv, single_observation_space: gym.Space) -> None:
        super().__init__(env)
        self.single_observation_space = single_observation_space
        self.observation_space = batch_space(single_observation_space, env.num_envs)

    def transform(self, obs: Obs) -> Obs:
        """The new observations of all rows; `obs` itself stays as it is."""
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self.transform(obs), info

    def step(self, actions: Any) -> StepResult:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        if info:
            info = {**info, "final_obs": self.transform(info["final_obs"])}
        return self.transform(obs), reward, terminated, truncated, info


class StandardForm(ObservationTransform):
    """float64 observations as float32, and uint8 images [H, W, C] as [C, H, W]."""

    def __init__(self, env: VectorEnv) -> None:
        old = env.single_observation_space
        super().__init__(env, map_space(_standard_space, old))
        self._convert = map_leaves(_standard_leaf, leaf_spaces(old))

    @staticmethod
    def needed(space: gym.Space) -> bool:
        """Whether some leaf is not in standard form yet."""
        return any_leaf(lambda leaf: _is_float64(leaf) or _is_channel_last(leaf), space)

    def transform(self, obs: Obs) -> Obs:
        return map_leaves(lambda leaf, convert: convert(leaf), obs, self._convert)


def _is_float64(space: gym.Space) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.float64


def _is_channel_last(space: gym.Space) -> bool:
    """An image of 1, 3 or 4 channels that stand last (and not first)."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) != 3:
        return False
    return space.shape[2] in (1, 3, 4) and space.shape[0] not in (1, 3, 4)


def _standard_leaf(space: gym.Space) -> Callable[[np.ndarray], np.ndarray]:
    if _is_float64(space):
        return lambda leaf: leaf.astype(np.float32)
    if _is_channel_last(space):
        return lambda leaf: np.ascontiguousarray(np.moveaxis(leaf, -1, 1))
    return lambda leaf: leaf


def _standard_space(space: gym.Space) -> gym.Space:
    if not isinstance(space, spaces.Box):
        return space
    convert = _standard_leaf(space)
    low, high = convert(space.low[None])[0], convert(space.high[None])[0]
    return spaces.Box(low, high, dtype=low.dtype)


class MaskVelocity(ObservationTransform):
    """Leaves out the velocities, so that the state must be remembered.

    They are dropped and not set to zero: the same information, in a space that says so.
    """

    def __init__(self, env: VectorEnv, env_id: str) -> None:
        name = env_id.rpartition("-v")[0]
        if name not in VELOCITY_FREE:
            raise UserError(
                f"env.mask_velocity knows no velocities of {env_id}: remove it, "
                f"or choose one of {', '.join(VELOCITY_FREE)}"
            )
        self._keep = np.array(VELOCITY_FREE[name])
        old = env.single_observation_space
        if not isinstance(old, spaces.Box) or old.shape[0] <= self._keep[-1]:
            raise UserError(
                f"env.mask_velocity needs the plain observations of {env_id}, not {old}: remove it"
            )
        super().__init__(env, spaces.Box(old.low[self._keep], old.high[self._keep], dtype=old.dtype))

    def transform(self, obs: Obs) -> Obs:
        return obs[:, self._keep]


class ObservationNoise(ObservationTransform):
    """Adds independent Gaussian noise to every floating number that is observed."""

    def __init__(self, env: VectorEnv, env_id: str, std: float, seed: int | None) -> None:
        old = env.single_observation_space
        if not any_leaf(is_floating, old):
            raise UserError(
                f"env.observation_noise needs floating observations, {env_id} has none: set it to 0"
            )
        super().__init__(env, map_space(_unbounded, old))
        self._std, self._rng = std, np.random.default_rng(seed)
        self._noisy = map_leaves(is_floating, leaf_spaces(old))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        return super().reset(seed=seed, options=options)

    def transform(self, obs: Obs) -> Obs:
        return map_leaves(self._add_noise, obs, self._noisy)

    def _add_noise(self, leaf: np.ndarray, noisy: bool) -> np.ndarray:
        if not noisy:
            return leaf
        return leaf + np.float32(self._std) * self._rng.standard_normal(leaf.shape, dtype=np.float32)


def _unbounded(space: gym.Space) -> gym.Space:
    return spaces.Box(-np.inf, np.inf, space.shape, np.float32) if is_floating(space) else space


class FrameStack(VectorWrapper):
    """The last `size` observations side by side, the newest last; before the first there are copies of it.

    Images are joined along the channels (the first axis), everything else along the last axis; k observations
    of a Discrete space become a MultiDiscrete one.
    """

    def __init__(self, env: VectorEnv, size: int) -> None:
        super().__init__(env)
        self._size = size
        old = env.single_observation_space
        self.single_observation_space = map_space(self._stacked_space, old)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._axis = map_leaves(lambda leaf: 1 if _is_image(leaf) else -1, leaf_spaces(old))
        self._stack: Obs = None  # as observed: [N, size * ...]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._stack = map_leaves(self._repeat, obs, self._axis)
        return map_leaves(np.copy, self._stack), info

    def step(self, actions: Any) -> StepResult:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        pushed = map_leaves(self._push, self._stack, obs, self._axis)
        if info:
            info = {**info, "final_obs": map_leaves(self._push, self._stack, info["final_obs"], self._axis)}
            pushed = replace_rows(pushed, terminated | truncated, map_leaves(self._repeat, obs, self._axis))
        self._stack = pushed
        return map_leaves(np.copy, pushed), reward, terminated, truncated, info

    def _repeat(self, leaf: np.ndarray, axis: int) -> np.ndarray:
        return np.concatenate([_at_least_2d(leaf)] * self._size, axis=axis)

    def _push(self, stack: np.ndarray, leaf: np.ndarray, axis: int) -> np.ndarray:
        leaf = _at_least_2d(leaf)
        kept = np.split(stack, [leaf.shape[axis]], axis=axis)[1]
        return np.concatenate([kept, leaf], axis=axis)

    def _stacked_space(self, space: gym.Space) -> gym.Space:
        def repeat(bound: np.ndarray) -> np.ndarray:
            return np.concatenate([bound] * self._size, axis=0 if _is_image(space) else -1)

        if isinstance(space, spaces.Box):
            return spaces.Box(
                repeat(np.atleast_1d(space.low)), repeat(np.atleast_1d(space.high)), dtype=space.dtype
            )
        if isinstance(space, spaces.MultiDiscrete):
            return spaces.MultiDiscrete(repeat(space.nvec), dtype=space.dtype, start=repeat(space.start))
        if isinstance(space, spaces.Discrete):
            return spaces.MultiDiscrete([space.n] * self._size)
        return spaces.MultiBinary(repeat(np.empty(space.shape or ())).shape)


def _is_image(space: gym.Space) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 3


def _at_least_2d(leaf: np.ndarray) -> np.ndarray:
    return leaf[:, None] if leaf.ndim == 1 else leaf


class DelayedReward(VectorWrapper):
    """Sums the rewards and pays the sum every `delay` steps of an episode and at its end."""

    def __init__(self, env: VectorEnv, delay: int) -> None:
        super().__init__(env)
        self._delay = delay
        self._unpaid = np.zeros(env.num_envs)
        self._steps = np.zeros(env.num_envs, dtype=np.int64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict]:
        self._unpaid[:] = 0.0
        self._steps[:] = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> StepResult:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        ended = terminated | truncated
        self._unpaid += reward
        self._steps += 1
        due = ended | (self._steps % self._delay == 0)
        paid = np.where(due, self._unpaid, 0.0)
        self._unpaid[due] = 0.0
        self._steps[ended] = 0
        return obs, paid, terminated, truncated, info


class ActionSubset(VectorWrapper):
    """A Discrete action space of chosen actions: action i is `actions[i]` of the environment."""

    def __init__(self, env: VectorEnv, env_id: str, actions: list[int]) -> None:
        super().__init__(env)
        space = env.single_action_space
        if not isinstance(space, spaces.Discrete):
            raise UserError(f"env.actions chooses from a Discrete space, and {env_id} has {space}: remove it")
        refused = [action for action in actions if not space.start <= action < space.start + space.n]
        if not actions or refused or len(set(actions)) < len(actions):
            raise UserError(
                f"env.actions {actions}: {env_id} takes {space.start} to {space.start + space.n - 1}; "
                "name at least one of them, each once"
            )
        self._table = np.array(actions)
        self.single_action_space = spaces.Discrete(len(actions))
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def step(self, actions: Any) -> StepResult:
        return self.env.step(self._table[actions])
