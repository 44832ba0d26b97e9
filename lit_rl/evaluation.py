"""Evaluation: whole episodes of an agent that does not learn.

Shapes: E environments side by side, L steps an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from tensordict import TensorDict

from lit_rl import keys
from lit_rl.collectors import Arrays, check_finite, to_tensor
from lit_rl.envs.vector import replace_rows
from lit_rl.models.agent import Agent


@dataclass
class Episode:
    """One finished episode."""

    episode_return: float
    """Undiscounted sum of the environment's own rewards."""
    length: int
    """Steps."""
    success: float | None = None
    """1 or 0 where the environment tells, else None."""
    steps: TensorDict | None = None
    """``[L]`` in TorchRL's form (observation, action, next: observation, reward, ...) where recorded."""
    frames: list[np.ndarray] = field(default_factory=list)
    """Rendered pictures ``[height, width, 3]`` uint8 where asked for."""


class Episodes:
    """Runs a fixed number of episodes and yields each as it ends: what evaluation loaders iterate.

    Every environment plays its share, so that short episodes are not counted more often than long ones.
    Running statistics stand still. Each iteration starts from the same seed.

    Args:
        env: the batched environment (same-step autoreset, see `lit_rl.envs.vector`).
        agent: acts, on its own device.
        episodes: how many; with fewer episodes than processes some have none.
        greedy: take the policy's mode; sample otherwise.
        seed: of the environments' first reset and of sampled actions.
        record: keep every step (`Episode.steps`).
        render: keep pictures (`Episode.frames`) and end an episode that has so many; 0 keeps none.
        context: entered around every policy call, for example mixed precision.
    """

    def __init__(
        self,
        env: VectorEnv,
        agent: Agent,
        episodes: int,
        *,
        greedy: bool = True,
        seed: int = 0,
        record: bool = False,
        render: int = 0,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.env = env
        self.agent = agent
        self.episodes = episodes
        self.greedy = greedy
        self.seed = seed
        self.record = record
        self.render = render
        self.context = context

    def __len__(self) -> int:
        """At least 1: where a loader is empty Lightning skips evaluation, and other processes would wait."""
        return max(1, self.episodes)

    def __iter__(self) -> Iterator[Episode]:
        env, agent, E = self.env, self.agent, self.env.num_envs
        device = next(agent.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)
        left = np.full(E, self.episodes // E) + (np.arange(E) < self.episodes % E)
        episode_return, length = np.zeros(E), np.zeros(E, np.int64)
        steps: list[list[dict[str, Any]]] = [[] for _ in range(E)]
        frames: list[list[np.ndarray]] = [[] for _ in range(E)]

        observation, _ = env.reset(seed=self.seed)
        state = agent.initial_state(E)
        is_init = np.ones(E, bool)
        step_count = 0
        while left.any():
            check_finite(observation, env, step_count)
            if self.render and len(frames[0]) == self.render:
                yield Episode(float(episode_return[0]), int(length[0]), frames=frames[0])
                return
            if self.render:
                for row, picture in enumerate(env.render()):  # type: ignore[arg-type]
                    frames[row].append(np.asarray(picture))
            with self.context():
                step = agent.act(
                    to_tensor(observation, device),
                    state,
                    torch.from_numpy(is_init).to(device),
                    greedy=self.greedy,
                    generator=generator,
                )
            state = step.state
            action = agent.to_env(step.action).cpu().numpy()
            next_observation, reward, terminated, truncated, info = env.step(action)
            step_count += 1
            ended = terminated | truncated
            episode_return += reward
            length += 1
            if self.record:
                seen_next = (
                    replace_rows(next_observation, ended, info["final_obs"])
                    if ended.any()
                    else next_observation
                )
                for row in map(int, np.flatnonzero(left)):
                    values = (observation, action, seen_next, reward, terminated, truncated, is_init)
                    steps[row].append(_record(row, *values))
            for row in map(int, np.flatnonzero(ended)):
                if left[row]:
                    success = float(info["success"][row]) if "success" in info else np.nan
                    yield Episode(
                        float(episode_return[row]),
                        int(length[row]),
                        None if np.isnan(success) else success,
                        _as_tensordict(steps[row]) if self.record else None,
                        frames[row],
                    )
                    left[row] -= 1
                steps[row], frames[row] = [], []
                episode_return[row], length[row] = 0.0, 0
            observation, is_init = next_observation, ended


def _row(arrays: Arrays, row: int) -> Any:
    if isinstance(arrays, dict):
        return {key: _row(array, row) for key, array in arrays.items()}
    return torch.from_numpy(np.array(arrays[row]))


def _record(
    row: int,
    observation: Arrays,
    action: np.ndarray,
    next_observation: Arrays,
    reward: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    is_init: np.ndarray,
) -> dict[str, Any]:
    return {
        keys.OBSERVATION: _row(observation, row),
        keys.ACTION: _row(action, row),
        keys.IS_INIT: torch.tensor([bool(is_init[row])]),
        "next": {
            keys.OBSERVATION: _row(next_observation, row),
            keys.REWARD: torch.tensor([float(reward[row])]),
            keys.TERMINATED: torch.tensor([bool(terminated[row])]),
            keys.TRUNCATED: torch.tensor([bool(truncated[row])]),
            "done": torch.tensor([bool(terminated[row] or truncated[row])]),
        },
    }


def _as_tensordict(steps: Sequence[dict[str, Any]]) -> TensorDict:
    return torch.stack([TensorDict(step, []) for step in steps]).contiguous()


def summarize(episodes: Sequence[Episode]) -> dict[str, float]:
    """Mean and standard deviation over episodes: `return`, `return_std`, `length` and, if told, `success`."""
    returns = np.array([episode.episode_return for episode in episodes])
    summary = {
        "return": float(returns.mean()),
        "return_std": float(returns.std()),
        "length": float(np.mean([episode.length for episode in episodes])),
    }
    told = [episode.success for episode in episodes if episode.success is not None]
    if told:
        summary["success"] = float(np.mean(told))
    return summary
