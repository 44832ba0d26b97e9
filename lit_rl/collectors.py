"""The collector: an agent and a batched environment -> rollouts.

One fused policy call a step, numpy buffers allocated once, no TensorDict inside the loop but the
trunk's own state, and that state kept only at the start of each sequence.

Shapes: E environments, T steps a rollout, cut into K sequences of T / K steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.collectors import BaseCollector

from lit_rl import keys
from lit_rl.envs.vector import map_leaves
from lit_rl.errors import UserError
from lit_rl.models.agent import ActorCritic

EPISODE = (keys.EPISODE_RETURN, keys.EPISODE_LENGTH, keys.EPISODE_SUCCESS)

Arrays = np.ndarray | dict[str, np.ndarray]


def to_tensor(arrays: Arrays, device: torch.device | str = "cpu") -> Any:
    """Arrays (or a mapping of them) as tensors, sharing memory on the CPU."""
    if isinstance(arrays, np.ndarray):
        return torch.from_numpy(arrays).to(device)
    return {key: to_tensor(array, device) for key, array in arrays.items()}


def check_finite(arrays: Arrays, env: VectorEnv, step: int, rows: np.ndarray | bool = True) -> None:
    """Raises `UserError` where one of `rows` (bool [E]) is not a number, before anything learns from it."""
    for name, array in [("observation", arrays)] if isinstance(arrays, np.ndarray) else arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1) & rows)
            if len(bad):
                raise UserError(
                    f"{name} of environment {bad[0]} of {env_name(env)} is not finite at step {step}; "
                    "nothing was learnt from it, the last checkpoint is whole: mend the environment or bound "
                    "what it returns"
                )


def env_name(env: VectorEnv) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


class RolloutCollector(BaseCollector):
    """Collects rollouts of fixed length for on-policy learning.

    A rollout is ``{steps: [E, T] TensorDict, trunk_state: [E, K] TensorDict}`` (see `lit_rl.keys`), valid
    until the next one is asked for: buffers are reused.

    Args:
        create_env_fn: makes the batched environment (same-step autoreset, see `lit_rl.envs.vector`).
        policy: the agent that acts, on its own device.
        frames_per_batch: frames a rollout, E * T.
        total_frames: where iteration ends; -1 never.
        sequence_length: steps of a sequence; the whole rollout if absent. Must divide T.
        seed: of the actions' random state and of the environments' first reset.
        context: entered around every policy call, for example mixed precision.
        postproc: applied to every rollout; a TorchRL transform fits.

    Raises:
        UserError: sizes do not divide, or an environment fails or returns what is not finite.
    """

    def __init__(
        self,
        create_env_fn: Callable[..., VectorEnv],
        policy: ActorCritic,
        *,
        frames_per_batch: int,
        total_frames: int = -1,
        sequence_length: int | None = None,
        seed: int = 0,
        context: Callable[[], AbstractContextManager] = nullcontext,
        postproc: Callable[[TensorDict], TensorDict] | None = None,
    ) -> None:
        super().__init__()
        self.env = create_env_fn()
        self.policy = policy
        self.context = context
        self.postproc = postproc
        self.total_frames = total_frames
        self.requested_frames_per_batch = self.frames_per_batch = frames_per_batch
        self.device = next(policy.parameters()).device
        self.generator = torch.Generator(self.device)

        E = self.env.num_envs
        if frames_per_batch % E:
            raise UserError(f"{frames_per_batch} frames a rollout do not divide among {E} environments")
        self.num_steps = frames_per_batch // E
        self.sequence_length = sequence_length or self.num_steps
        if self.num_steps % self.sequence_length:
            raise UserError(
                f"sequence_length {self.sequence_length} does not divide the rollout_length {self.num_steps}"
            )
        self._allocate()
        self._frames = 0
        self._steps = 0
        self._current: Arrays  # observation of each environment, [E, ...]
        self._is_init: np.ndarray  # whether it is the first of an episode
        self._state: TensorDict  # trunk state before it
        self._return: np.ndarray  # of each episode so far
        self._length: np.ndarray
        self.set_seed(seed)

    def _allocate(self) -> None:
        E, T = self.env.num_envs, self.num_steps
        space, head = self.env.single_observation_space, self.policy.policy

        def observation(space: Any) -> Arrays:
            if hasattr(space, "spaces"):
                return {key: observation(part) for key, part in space.spaces.items()}  # type: ignore[misc]
            return np.zeros((E, T, *space.shape), space.dtype)

        self._observation = observation(space)
        action_dtype = torch.empty(0, dtype=head.action_dtype).numpy().dtype
        self._action = np.zeros((E, T, *head.action_shape), action_dtype)
        floats = (
            keys.LOG_PROB,
            keys.VALUE,
            keys.NEXT_VALUE,
            keys.REWARD,
            *EPISODE,
        )
        self._float = {key: np.zeros((E, T), np.float32) for key in floats}
        self._bool = {key: np.zeros((E, T), bool) for key in (keys.TERMINATED, keys.TRUNCATED, keys.IS_INIT)}

    # ------------------------------------------------------------------ the loop

    def rollout(self) -> TensorDict:
        """The next rollout, ``{steps [E, T], trunk_state [E, K]}``."""
        E, T = self.env.num_envs, self.num_steps
        value, next_value = self._float[keys.VALUE], self._float[keys.NEXT_VALUE]
        rewards = self._float[keys.REWARD]
        terminated_at, truncated_at = self._bool[keys.TERMINATED], self._bool[keys.TRUNCATED]
        for key in EPISODE:
            self._float[key].fill(np.nan)

        values_can_wait = self.policy.values_can_wait

        states: list[TensorDict] = []
        params: list[Tensor] = []
        bootstraps: list[tuple[np.ndarray, int, np.ndarray]] = []
        with torch.inference_mode(), self.context():
            noises = self.policy.policy.noise(T, E, generator=self.generator).unbind()
            for t in range(T):
                if t % self.sequence_length == 0:
                    states.append(self._state)
                self._bool[keys.IS_INIT][:, t] = self._is_init
                self._store(self._observation, self._current, t)

                step = self.policy.act(
                    to_tensor(self._current, self.device),
                    self._state,
                    torch.from_numpy(self._is_init).to(self.device),
                    with_value=not values_can_wait,
                    noise=noises[t],
                )
                self._state = step.state
                action = step.action.cpu().numpy()
                self._action[:, t] = action  # now: an environment may change what it gets
                params.append(step.params)
                if step.value is not None:
                    value[:, t] = step.value.cpu().numpy()

                self._current, reward, terminated, truncated, info = self.env.step(
                    self.policy.to_env(step.action).cpu().numpy()
                )
                self._steps += 1
                check_finite(self._current, self.env, self._steps)
                rewards[:, t], terminated_at[:, t], truncated_at[:, t] = reward, terminated, truncated
                self._return += reward
                self._length += 1
                self._is_init = terminated | truncated
                if self._is_init.any():
                    cut = truncated & ~terminated
                    if cut.any():
                        bootstraps.append(
                            (cut, t, self._value(info["final_obs"], self._state, np.zeros(E, bool)))
                        )
                    self._close_episodes(t, info)

            # Of the distributions that acted, only worked out for all steps at once.
            action = to_tensor(self._action, self.device)
            log_prob = self.policy.policy.log_prob(torch.stack(params, dim=1), action)
            self._float[keys.LOG_PROB][:] = log_prob.cpu().numpy()
            if values_can_wait:
                every_step = map_leaves(
                    lambda array: array.reshape(E * T, *array.shape[2:]), self._observation
                )
                state, no_reset = self.policy.initial_state(E * T), np.zeros(E * T, bool)
                value[:] = self._value(every_step, state, no_reset).reshape(E, T)
            # V of the next observation: the next column, but where an episode was cut short.
            next_value[:, :-1] = value[:, 1:]
            next_value[:, -1] = self._value(self._current, self._state, self._is_init)
        for cut, t, final_value in bootstraps:
            next_value[cut, t] = final_value[cut]
        next_value[terminated_at] = 0.0

        if not np.isfinite(rewards).all():
            t = int(np.argwhere(~np.isfinite(rewards))[:, 1].min())
            check_finite({"reward": rewards[:, t]}, self.env, self._steps - T + t + 1)
        self._frames += E * T
        return self._assemble(states)

    def _value(self, observation: Arrays, state: TensorDict, is_init: np.ndarray) -> np.ndarray:
        reset = torch.from_numpy(is_init).to(self.device)
        return self.policy.value(to_tensor(observation, self.device), state, reset).cpu().numpy()

    def _close_episodes(self, t: int, info: dict[str, Any]) -> None:
        ended = self._is_init
        check_finite(info["final_obs"], self.env, self._steps, rows=ended)
        self._float[keys.EPISODE_RETURN][ended, t] = self._return[ended]
        self._float[keys.EPISODE_LENGTH][ended, t] = self._length[ended]
        if "success" in info:
            self._float[keys.EPISODE_SUCCESS][ended, t] = info["success"][ended]
        self._return[ended] = 0.0
        self._length[ended] = 0

    def _store(self, buffer: Arrays, arrays: Arrays, t: int) -> None:
        if isinstance(buffer, dict):
            for key in buffer:
                buffer[key][:, t] = arrays[key]
        else:
            buffer[:, t] = arrays

    def _assemble(self, states: list[TensorDict]) -> TensorDict:
        batch_size = [self.env.num_envs, self.num_steps]

        def tensors(arrays: Arrays) -> Tensor | TensorDict:
            if isinstance(arrays, dict):
                return TensorDict({key: tensors(array) for key, array in arrays.items()}, batch_size)
            return torch.from_numpy(arrays)

        steps = TensorDict(
            {
                keys.OBSERVATION: tensors(self._observation),
                keys.ACTION: tensors(self._action),
                **{key: tensors(array) for key, array in (self._float | self._bool).items()},
            },
            batch_size,
        )
        trunk_state = torch.stack(states, dim=1)
        rollout = TensorDict({keys.STEPS: steps, keys.TRUNK_STATE: trunk_state}, batch_size[:1])
        return rollout if self.postproc is None else self.postproc(rollout)

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
        self.generator.set_state(state_dict["generator"].cpu())
        seed = np.random.SeedSequence([self.generator.initial_seed(), self._frames]).generate_state(1)[0]
        self.reset(seed=int(seed) % 2**31)

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
