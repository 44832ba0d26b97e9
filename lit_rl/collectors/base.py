"""What every collector does: steps a batched environment with an agent, keeps count of episodes.

Shapes: E environments, T steps a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import BaseCollector

from lit_rl import keys
from lit_rl.envs.vector import derived_seed
from lit_rl.errors import UserError
from lit_rl.models.agent import Agent

EPISODE = (keys.EPISODE_RETURN, keys.EPISODE_LENGTH, keys.EPISODE_SUCCESS)

Arrays = np.ndarray | dict[str, np.ndarray]


def to_tensor(arrays: Arrays, device: torch.device | str = "cpu") -> Any:
    """Arrays (or a mapping of them) as tensors, sharing memory on the CPU."""
    if isinstance(arrays, np.ndarray):
        return torch.from_numpy(arrays).to(device)
    return {key: to_tensor(array, device) for key, array in arrays.items()}


def observation_buffer(space: spaces.Space, leading: tuple[int, ...]) -> Arrays:
    """Zeros ``[*leading, ...]`` for observations of a space; a mapping of them for a Dict space."""
    if isinstance(space, spaces.Dict):
        return {key: observation_buffer(part, leading) for key, part in space.spaces.items()}  # type: ignore[misc]
    return np.zeros((*leading, *(space.shape or ())), space.dtype)


def check_finite(arrays: Arrays, env: VectorEnv, step: int, rows: np.ndarray | bool = True) -> None:
    """Raises `UserError` where one of `rows` (bool [E]) is not a number, before anything learns from it."""
    for name, array in [("observation", arrays)] if isinstance(arrays, np.ndarray) else arrays.items():
        if array.dtype.kind != "f":
            continue
        # The sum of squares, which is quick, is finite unless a number is not or some are huge.
        is_finite = array.dtype.itemsize >= 4 and np.isfinite(np.vdot(array, array))
        if not (is_finite or np.isfinite(array).all()):
            bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1) & rows)
            if len(bad):
                raise UserError(
                    f"{name} of environment {bad[0]} of {env_name(env)} is not finite at step {step}; "
                    "nothing was learnt from it, the last checkpoint is whole: mend the environment or bound "
                    "what it returns"
                )


def env_name(env: VectorEnv) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


class EnvCollector(BaseCollector):
    """TorchRL's collector interface over a `gymnasium.vector.VectorEnv`; a subclass says what a batch is.

    Args:
        create_env_fn: makes the batched environment (same-step autoreset, see `lit_rl.envs.vector`).
        policy: the agent that acts, on its own device.
        frames_per_batch: frames a batch, E * T.
        total_frames: where iteration ends; -1 never.
        seed: of the actions' random state and of the environments' first reset.
        context: entered while collecting, for example mixed precision; autocast leaves environments alone.

    Raises:
        UserError: sizes do not divide, or an environment fails or returns what is not finite.
    """

    def __init__(
        self,
        create_env_fn: Callable[..., VectorEnv],
        policy: Agent,
        *,
        frames_per_batch: int,
        total_frames: int = -1,
        seed: int = 0,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        super().__init__()
        self.env = create_env_fn()
        self.policy = policy
        self.context = context
        self.total_frames = total_frames
        self.requested_frames_per_batch = self.frames_per_batch = frames_per_batch
        self.device = next(policy.parameters()).device
        self.generator = torch.Generator(self.device)
        E = self.env.num_envs
        if frames_per_batch % E:
            raise UserError(f"{frames_per_batch} frames a rollout do not divide among {E} environments")
        self.num_steps = frames_per_batch // E
        self._episodes = {key: np.zeros((E, self.num_steps), np.float32) for key in EPISODE}
        self._frames = 0
        self._steps = 0
        self._current: Arrays  # observation of each environment, [E, ...]
        self._is_init: np.ndarray  # whether it is the first of an episode
        self._state: TensorDict  # the agent's memory before it
        self._return: np.ndarray  # of each episode so far
        self._length: np.ndarray
        self.set_seed(seed)

    @abstractmethod
    def rollout(self) -> TensorDict:
        """The next batch."""

    def _forget_episodes(self) -> None:
        """Before a batch: NaN stands where no episode ends."""
        for array in self._episodes.values():
            array.fill(np.nan)

    def _step_env(self, action: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
        """Steps the environments: reward, terminated, truncated ``[E]`` and info; keeps what comes next."""
        with torch.inference_mode(False), self._without_autocast():
            self._current, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        check_finite(self._current, self.env, self._steps)
        self._return += reward
        self._length += 1
        self._is_init = terminated | truncated
        if info:
            self._close_episodes(t, info)
        return reward, terminated, truncated, info

    def _without_autocast(self) -> AbstractContextManager:
        """An environment may compute with torch: the policy's precision is not for it."""
        device = self.device.type
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()

    def _close_episodes(self, t: int, info: dict[str, Any]) -> None:
        ended = self._is_init
        check_finite(info["final_obs"], self.env, self._steps, rows=ended)
        self._episodes[keys.EPISODE_RETURN][ended, t] = self._return[ended]
        self._episodes[keys.EPISODE_LENGTH][ended, t] = self._length[ended]
        if "success" in info:
            self._episodes[keys.EPISODE_SUCCESS][ended, t] = info["success"][ended]
        self._return[ended] = 0.0
        self._length[ended] = 0

    def _check_rewards(self, rewards: np.ndarray) -> None:
        """Raises `UserError` for a reward ``[E, T]`` of this batch that is not a number."""
        if not np.isfinite(rewards).all():
            t = int(np.argwhere(~np.isfinite(rewards))[:, 1].min())
            check_finite({"reward": rewards[:, t]}, self.env, self._steps - rewards.shape[1] + t + 1)

    # ------------------------------------------------------------------ TorchRL's collector interface

    def iterator(self) -> Iterator[TensorDict]:
        while self.total_frames < 0 or self._frames < self.total_frames:
            yield self.rollout()

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the actions and starts new episodes, a seed a row; returns another seed."""
        self.generator.manual_seed(seed)
        self.reset(seed=seed)
        return seed if static_seed else seed + self.env.num_envs

    def reset(self, seed: int | None = None) -> None:
        """Starts a new episode in every environment."""
        E = self.env.num_envs
        self._current, _ = self.env.reset(seed=seed)
        check_finite(self._current, self.env, self._steps)
        self._is_init = np.ones(E, bool)
        self._state = self.policy.initial_state(E)
        self._return = np.zeros(E)
        self._length = np.zeros(E, np.int64)

    def state_dict(self) -> OrderedDict:
        """Frames and the actions' random state; simulators are not in it (`load_state_dict` resets them)."""
        return OrderedDict(frames=self._frames, steps=self._steps, generator=self.generator.get_state())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a saved state, in new episodes that differ from those of the first start."""
        self._frames = state_dict["frames"]
        self._steps = state_dict["steps"]
        state = state_dict["generator"].cpu()
        if state.shape == self.generator.get_state().shape:
            self.generator.set_state(state)
        else:  # of another kind of device, which draws other numbers
            self.generator.manual_seed(derived_seed(self.generator.initial_seed(), self._frames))
        self.reset(seed=derived_seed(self.generator.initial_seed(), self._frames))

    def _maybe_fallback_update(self, policy_or_weights: Any = None, *, model_id: str | None = None) -> None:
        """For `update_policy_weights_`: copies weights in; without any, the policy is the caller's own."""
        if isinstance(policy_or_weights, nn.Module):
            policy_or_weights = TensorDict.from_module(policy_or_weights)
        if policy_or_weights is not None:
            TensorDict.from_module(self.policy).data.update_(policy_or_weights.data)

    def shutdown(
        self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True
    ) -> None:
        if close_env:
            self.env.close()
