"""Rollouts: what an agent did in a fixed number of steps, for on-policy learning.

One fused policy call a step, numpy buffers allocated once, no TensorDict inside the loop but the
trunk's own state, and that state kept only at the start of each sequence.

Shapes: E environments, T steps a rollout, cut into K sequences of T / K steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from tensordict import TensorDict
from torch import Tensor

from lit_rl import keys
from lit_rl.collectors.base import Arrays, EnvCollector, observation_buffer, to_tensor
from lit_rl.envs.vector import map_leaves
from lit_rl.errors import UserError
from lit_rl.models.actor_critic import Action, ActorCritic
from lit_rl.models.fused import FusedActorCritic, fused


class RolloutCollector(EnvCollector):
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
        context: entered while collecting, for example mixed precision; autocast leaves environments alone.
        postproc: applied to every rollout; a TorchRL transform fits.

    Raises:
        UserError: sizes do not divide, or an environment fails or returns what is not finite.
    """

    policy: ActorCritic

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
        super().__init__(
            create_env_fn,
            policy,
            frames_per_batch=frames_per_batch,
            total_frames=total_frames,
            seed=seed,
            context=context,
        )
        self.postproc = postproc
        self.sequence_length = sequence_length or self.num_steps
        if self.num_steps % self.sequence_length:
            raise UserError(
                f"sequence_length {self.sequence_length} does not divide the rollout_length {self.num_steps}"
            )
        self._fused: FusedActorCritic | None = None  # of this rollout
        self._allocate()

    def _allocate(self) -> None:
        E, T = self.env.num_envs, self.num_steps
        space, head = self.env.single_observation_space, self.policy.policy

        self._observation = observation_buffer(space, (E, T))
        action_dtype = torch.empty(0, dtype=head.action_dtype).numpy().dtype
        self._action = np.zeros((E, T, *head.action_shape), action_dtype)
        floats = (
            keys.LOG_PROB,
            keys.VALUE,
            keys.NEXT_VALUE,
            keys.REWARD,
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
        self._forget_episodes()
        values_can_wait = self.policy.values_can_wait

        states: list[TensorDict] = []
        params: list[Tensor] = []
        bootstraps: list[tuple[np.ndarray, int, np.ndarray]] = []
        with torch.inference_mode(), self.context():
            noises = self.policy.policy.noise(T, E, generator=self.generator).unbind()
            self._fused = fused(self.policy, E)
            for t in range(T):
                if t % self.sequence_length == 0:
                    states.append(self._state)
                self._bool[keys.IS_INIT][:, t] = self._is_init
                self._store(self._observation, self._current, t)

                step = self._act(noises[t])
                self._state = step.state
                action = step.action.cpu().numpy()
                self._action[:, t] = action  # now: an environment may change what it gets
                params.append(step.params)
                if step.value is not None:
                    value[:, t] = step.value.cpu().numpy()

                to_env = self.policy.to_env(step.action)
                reward, terminated, truncated, info = self._step_env(
                    action if to_env is step.action else to_env.cpu().numpy(), t
                )
                rewards[:, t], terminated_at[:, t], truncated_at[:, t] = reward, terminated, truncated
                if info:
                    cut = truncated & ~terminated
                    if cut.any():
                        bootstraps.append(
                            (cut, t, self._value(info["final_obs"], self._state, np.zeros(E, bool)))
                        )

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

        self._check_rewards(rewards)
        self._frames += E * T
        return self._assemble(states)

    def _act(self, noise: Tensor) -> Action:
        if self._fused is not None:
            params = self._fused.policy(cast(np.ndarray, self._current))
            return Action(self.policy.policy.choose(params, noise), params, None, self._state)
        return self.policy.act(
            to_tensor(self._current, self.device),
            self._state,
            torch.from_numpy(self._is_init).to(self.device),
            with_value=not self.policy.values_can_wait,
            noise=noise,
        )

    def _value(self, observation: Arrays, state: TensorDict, is_init: np.ndarray) -> np.ndarray:
        if self._fused is not None:
            return self._fused.value(cast(np.ndarray, observation)).numpy()[:, 0]
        reset = torch.from_numpy(is_init).to(self.device)
        return self.policy.value(to_tensor(observation, self.device), state, reset).cpu().numpy()

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
                **{key: tensors(array) for key, array in (self._float | self._bool | self._episodes).items()},
            },
            batch_size,
        )
        trunk_state = torch.stack(states, dim=1)
        rollout = TensorDict({keys.STEPS: steps, keys.TRUNK_STATE: trunk_state}, batch_size[:1])
        return rollout if self.postproc is None else self.postproc(rollout)
