"""The `env:` section of a configuration: typed, plain values."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import gymnasium as gym
from gymnasium.vector import VectorEnv

from lit_rl.envs.make import make_vector_env


@dataclass
class EnvConfig:
    """Which environment, how many, and what stands between it and the agent.

    Args:
        id: Gymnasium id, with either backend; EnvPool's own Atari ids have EnvPool's own preprocessing.
        num_envs: Rows of the batch.
        backend: `gymnasium`, or `envpool` (an extra).
        vectorization: Gymnasium only: all rows in this process, or one process a row.
        kwargs: Options of the environment itself, those of highway-env within a `config`.
        time_limit: Steps after which an episode is truncated; none keeps the environment's own limit.
        frame_stack: Observations seen at once, the newest last.
        mask_velocity: Drop the velocities (classic control and LunarLander).
        observation_noise: Standard deviation of Gaussian noise on floating observations.
        reward_delay: Pay the summed reward every so many steps and at the episode's end; 0 is off.
        view_size: MiniGrid: the side of the agent's view, cropped from the 7x7 one.
        actions: The actions that the agent may take, of a discrete space; none is all of them.
        wrappers: Gymnasium wrappers of each row, innermost first: a class path, or a mapping with
            `class_path` and `init_args`.
    """

    id: str = "CartPole-v1"
    num_envs: int = 8
    backend: Literal["gymnasium", "envpool"] = "gymnasium"
    vectorization: Literal["sync", "async"] = "sync"
    kwargs: dict[str, Any] = field(default_factory=dict)
    time_limit: int | None = None
    frame_stack: int = 1
    mask_velocity: bool = False
    observation_noise: float = 0.0
    reward_delay: int = 0
    view_size: int | None = None
    actions: list[int] | None = None
    wrappers: list[str | dict[str, Any]] = field(default_factory=list)

    def make(
        self, num_envs: int | None = None, *, seed: int | None = None, render_mode: str | None = None
    ) -> VectorEnv:
        """The batched environment, as `lit_rl.envs.vector` describes it.

        Args:
            num_envs: Rows, if other than configured.
            seed: Seed of the first reset, of the action space and of the wrappers' noise; none is random.
            render_mode: Passed to the environment; `render()` then returns a frame for each row.

        Raises:
            UserError: any value that cannot work, in one line.
        """
        return make_vector_env(self, self.num_envs if num_envs is None else num_envs, seed, render_mode)

    def spaces(self) -> tuple[gym.Space, gym.Space]:
        """Observation and action space of one row. Made once, by building one environment and closing it."""
        observation_space, action_space, _ = self._of_one_row
        return observation_space, action_space

    @property
    def episode_limit(self) -> int | None:
        """Steps after which an episode is truncated; None where the environment does not say."""
        _, _, limit = self._of_one_row
        return limit

    @cached_property
    def _of_one_row(self) -> tuple[gym.Space, gym.Space, int | None]:
        env = self.make(num_envs=1)
        env.close()
        limit = None if env.spec is None else env.spec.max_episode_steps
        return env.single_observation_space, env.single_action_space, limit
