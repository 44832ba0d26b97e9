"""Windows: overlapping or adjacent cuts out of the stream of each environment, for off-policy learning.

The stream of an environment is one observation after another, episode after episode. Where an episode is
truncated, its true last observation stands in the stream as a step of its own, on which no action is taken
(`has_action` is false): whatever bootstraps there reads it off the same pass as every other step, with the
memory that belongs to it. After a termination nothing is bootstrapped, and its last observation is left out::

    truncated    o0 a0 r0 | o1 a1 r1 | o2 -- --  | o0' a0' r0' ...      o2: has_action false, o0': is_init
    terminated   o0 a0 r0 | o1 a1 r1 | o0' a0' r0' ...                  step 1: terminated, o0': is_init

Shapes: E environments, T steps a batch, W windows of L steps: those learnt from and those that only follow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from tensordict import TensorDict
from torch import Tensor

from lit_rl import keys
from lit_rl.collectors.base import Arrays, EnvCollector, observation_buffer, to_tensor
from lit_rl.envs.vector import map_leaves
from lit_rl.errors import check_range
from lit_rl.models.fused import FusedQNetwork, fused_q
from lit_rl.models.q_network import QAction, QNetwork


class WindowCollector(EnvCollector):
    """Collects steps and gives the windows that they complete.

    A batch is ``{windows: [W] TensorDict, episodes: [E, T] TensorDict}`` (see `lit_rl.keys`); W changes
    from batch to batch. No window crosses a reset of the simulators.

    Args:
        create_env_fn: makes the batched environment (same-step autoreset, see `lit_rl.envs.vector`).
        policy: the Q-network that acts, on its own device.
        window: steps of a window.
        lookahead: steps that follow them, to bootstrap from.
        stride: steps from the start of one window to the next: `window`, the most, makes them adjacent, less
            makes them overlap.
        unlearnt: how many of its first steps have no loss; windows with no action behind them are left out.
        frames_per_batch: frames a batch, E * T.
        total_frames: where iteration ends; -1 never.
        with_state: keep the memory that the agent had at the start of each window.
        with_latent: keep the latent of each step as it was when acting.
        seed: of the actions' random state and of the environments' first reset.
        context: entered while collecting, for example mixed precision; autocast leaves environments alone.

    Raises:
        UserError: sizes do not divide or fit, or an environment fails or returns what is not finite.
    """

    policy: QNetwork

    def __init__(
        self,
        create_env_fn: Callable[..., VectorEnv],
        policy: QNetwork,
        *,
        window: int = 1,
        lookahead: int = 1,
        stride: int = 1,
        unlearnt: int = 0,
        frames_per_batch: int,
        total_frames: int = -1,
        with_state: bool = False,
        with_latent: bool = False,
        seed: int = 0,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        check_range({"window": window, "lookahead": lookahead}, 1)
        check_range({"stride": stride}, 1, window)
        check_range({"unlearnt": unlearnt}, 0, window - 1)
        super().__init__(
            create_env_fn,
            policy,
            frames_per_batch=frames_per_batch,
            total_frames=total_frames,
            seed=seed,
            context=context,
        )
        self.window = window
        self.lookahead = lookahead
        self.stride = stride
        self.unlearnt = unlearnt
        self._fused: FusedQNetwork | None = None  # of this batch
        self._allocate(with_state, with_latent)

    def _allocate(self, with_state: bool, with_latent: bool) -> None:
        """The last steps of each stream, ``[E, C, ...]``: what windows still need, and room for more."""
        E = self.env.num_envs
        self._room = 2 * self.num_steps  # every step may be a truncation
        C = self.window + self.lookahead + 4 * self._room

        self._observation = observation_buffer(self.env.single_observation_space, (E, C))
        self._stream: dict[str, np.ndarray] = {
            keys.ACTION: np.zeros((E, C), np.int64),
            keys.REWARD: np.zeros((E, C), np.float32),
            keys.TERMINATED: np.zeros((E, C), bool),
            keys.IS_INIT: np.zeros((E, C), bool),
            keys.HAS_ACTION: np.zeros((E, C), bool),
        }
        if with_latent:
            self._stream[keys.LATENT] = np.zeros((E, C, self.policy.trunk.out_features), np.float32)
        # What the steps of one batch saw and did, before it goes to its places in the streams.
        self._taken_observation = observation_buffer(self.env.single_observation_space, (E, self.num_steps))
        self._taken = {
            key: np.zeros((E, self.num_steps, *stream.shape[2:]), stream.dtype)
            for key, stream in self._stream.items()
            if key != keys.HAS_ACTION
        }
        self._states = self.policy.initial_state(E * C).view(E, C) if with_state else None

    # ------------------------------------------------------------------ the loop

    def rollout(self) -> TensorDict:
        """The next batch, ``{windows [W], episodes [E, T]}``."""
        E, T = self.env.num_envs, self.num_steps
        self._forget_episodes()
        self._make_room()
        taken, every_row = self._taken, np.arange(E)
        at_ET = np.empty((E, T), np.int64)  # of each step in its stream
        with torch.inference_mode(), self.context():
            noises = self.policy.noise(T, E, generator=self.generator).unbind()
            self._fused = fused_q(self.policy, E)
            for t in range(T):
                self._keep_state(every_row)
                at_ET[:, t] = self._count
                self._count += 1

                def put(kept: np.ndarray, new: np.ndarray, t: int = t) -> None:
                    kept[:, t] = new

                map_leaves(put, self._taken_observation, self._current)
                taken[keys.IS_INIT][:, t] = self._is_init
                step = self._act(noises[t])
                self._state = step.state
                taken[keys.ACTION][:, t] = step.action.cpu().numpy()
                if keys.LATENT in taken:
                    taken[keys.LATENT][:, t] = step.latent.float().cpu().numpy()
                reward, terminated, truncated, info = self._step_env(
                    self.policy.to_env(step.action).cpu().numpy(), t
                )
                taken[keys.REWARD][:, t] = reward
                taken[keys.TERMINATED][:, t] = terminated
                if info:
                    self._append_last_observations(truncated & ~terminated, info["final_obs"])
        self._check_rewards(taken[keys.REWARD])
        self._put((every_row[:, None], at_ET), self._taken_observation, taken | {keys.HAS_ACTION: True})
        self._frames += E * T
        episodes = {key: torch.from_numpy(array) for key, array in self._episodes.items()}
        return TensorDict({keys.WINDOWS: self.windows(), keys.EPISODES: TensorDict(episodes, [E, T])}, [])

    def _act(self, noise: Tensor) -> QAction:
        if self._fused is not None:
            latent, values = self._fused(cast(np.ndarray, self._current))
            return QAction((values + noise).argmax(-1), latent, self._state)
        observation, is_init = to_tensor(self._current, self.device), torch.from_numpy(self._is_init)
        return self.policy.act(observation, self._state, is_init.to(self.device), noise=noise)

    def _put(self, at: tuple[np.ndarray, np.ndarray], observation: Arrays, values: dict[str, Any]) -> None:
        """Writes steps into the streams, at the given rows and places."""

        def put(stream: np.ndarray, new: np.ndarray) -> None:
            stream[at] = new

        map_leaves(put, self._observation, observation)
        for key, value in values.items():
            self._stream[key][at] = value

    def _append_last_observations(self, cut: np.ndarray, final_obs: Arrays) -> None:
        """The true last observation of the episodes that were `cut` short (bool ``[E]``)."""
        rows = np.flatnonzero(cut)
        if not len(rows):
            return
        self._keep_state(rows)
        nothing = (keys.ACTION, keys.REWARD, keys.TERMINATED, keys.IS_INIT, keys.HAS_ACTION)
        values: dict[str, Any] = dict.fromkeys(nothing, 0)
        if keys.LATENT in self._stream:
            values[keys.LATENT] = self._latent(final_obs).float().cpu().numpy()[rows]
        self._put((rows, self._count[rows]), map_leaves(lambda array: array[rows], final_obs), values)
        self._count[rows] += 1

    def _latent(self, observation: Arrays) -> Tensor:
        """Of what follows the last step in the same episode."""
        if self._fused is not None:
            return self._fused(cast(np.ndarray, observation))[0]
        no_reset = torch.zeros(self.env.num_envs, dtype=torch.bool, device=self.device)
        return self.policy.latent(to_tensor(observation, self.device), self._state, no_reset)[0]

    def _keep_state(self, rows: np.ndarray) -> None:
        """The memory before the next step of `rows`, where a window starts there."""
        if self._states is None:
            return
        rows = rows[(self._count[rows] - self._start[rows]) % self.stride == 0]
        if len(rows):
            at = torch.from_numpy(rows), torch.from_numpy(self._count[rows])
            self._states[at] = self._state if len(rows) == len(self._count) else self._state[at[0]]

    # ------------------------------------------------------------------ windows

    def windows(self) -> TensorDict:
        """The windows ``[W]`` that have become complete; each is given once."""
        L = self.window + self.lookahead
        E, C = self._stream[keys.ACTION].shape
        complete_E = np.maximum((self._count - L - self._start) // self.stride + 1, 0)
        row_W = np.repeat(np.arange(E), complete_E)
        number_W = np.arange(len(row_W)) - (complete_E.cumsum() - complete_E)[row_W]  # within its row
        start_W = row_W * C + self._start[row_W] + self.stride * number_W
        self._start += self.stride * complete_E
        at_WL = start_W[:, None] + np.arange(L)
        has_action = self._stream[keys.HAS_ACTION].reshape(-1)
        at_WL = at_WL[has_action[at_WL[:, self.unlearnt : self.window]].any(1)]

        def cut(stream: np.ndarray) -> Tensor:
            return torch.from_numpy(stream.reshape(-1, *stream.shape[2:])[at_WL])

        observation = map_leaves(cut, self._observation)
        if isinstance(observation, dict):
            observation = TensorDict(observation, list(at_WL.shape))
        steps = {keys.OBSERVATION: observation} | {key: cut(stream) for key, stream in self._stream.items()}
        windows: dict[str, TensorDict] = {keys.STEPS: TensorDict(steps, list(at_WL.shape))}
        if self._states is not None:
            windows[keys.TRUNK_STATE] = self._states.view(-1)[torch.from_numpy(at_WL[:, 0])]
        return TensorDict(windows, [len(at_WL)])

    def _make_room(self) -> None:
        """Drops what no window needs any more, where the next batch might not fit."""
        if self._count.max() + self._room <= self._stream[keys.ACTION].shape[1]:
            return
        row_E1 = np.arange(len(self._count))[:, None]
        kept = int((self._count - self._start).max())
        # Rows that keep less take along what lies behind it, which is overwritten before it is read.
        at_EK = np.minimum(self._start[:, None] + np.arange(kept), self._stream[keys.ACTION].shape[1] - 1)

        def move(stream: np.ndarray) -> None:
            stream[:, :kept] = stream[row_E1, at_EK]

        map_leaves(move, self._observation)
        map_leaves(move, self._stream)
        if self._states is not None:
            self._states[:, :kept] = self._states[torch.from_numpy(row_E1), torch.from_numpy(at_EK)]
        self._count -= self._start
        self._start[:] = 0

    def reset(self, seed: int | None = None) -> None:
        """Starts a new episode in every environment, and with it a new stream."""
        super().reset(seed)
        self._start = np.zeros(self.env.num_envs, np.int64)  # of the next window
        self._count = np.zeros(self.env.num_envs, np.int64)  # steps of each stream
