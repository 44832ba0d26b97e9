"""The gymnasium backend: one `gym.make` a row, in this process or one process a row."""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array, iterate

from lit_rl.envs.checks import cause_of, is_atari, is_highway, is_minigrid, unknown_id
from lit_rl.envs.highway import make_highway
from lit_rl.envs.minigrid import SymbolicView
from lit_rl.envs.vector import (
    FirstSeed,
    GuardedEnv,
    SameStepVectorEnv,
    StepResult,
    env_fault,
    map_leaves,
    spec_of,
)
from lit_rl.errors import UserError

if TYPE_CHECKING:
    from lit_rl.envs.config import EnvConfig


def make_gymnasium(
    config: "EnvConfig", num_envs: int, seed: int | None, render_mode: str | None
) -> VectorEnv:
    """`num_envs` rows of `config.id`, under the contract of `vector`."""

    def row(index: int) -> Callable[[], gym.Env]:
        return lambda: GuardedEnv(make_row(config, render_mode), config.id, index)

    rows = [row(index) for index in range(num_envs)]
    if config.vectorization == "async":
        first = row(0)()  # a bad option shows here, as one line, and not as the trace of a worker
        spec = spec_of(config, _episode_limit(first))
        first.close()
        processes = _QuietAsyncVectorEnv(rows, autoreset_mode=AutoresetMode.SAME_STEP)
        processes.spec = spec
        return SameStepVectorEnv(processes, seed)
    here = _SyncRows(rows, autoreset_mode=AutoresetMode.SAME_STEP)
    here.spec = spec_of(config, _episode_limit(here.envs[0]))
    return FirstSeed(here, seed)


def _episode_limit(row: gym.Env) -> int | None:
    """Steps after which an episode is truncated. Packages that do so themselves each have their own word."""
    spec, simulator = row.spec, cast(Any, row.unwrapped)
    if spec is not None and spec.max_episode_steps is not None:
        return spec.max_episode_steps
    if spec is not None and is_highway(spec.id):
        return int(simulator.config["duration"] * simulator.config["policy_frequency"])
    return getattr(simulator, "max_steps", None)  # MiniGrid


class _SyncRows(SyncVectorEnv):
    """All rows in this process, one after the other, under the contract of `vector`.

    gymnasium's own step asks each row for the mode of autoreset, copies each result three times and merges
    dictionaries, which a cheap environment is felt to pay for.
    """

    def step(self, actions: Any) -> StepResult:
        observations: list[Any] = []
        rewards, terminations, truncations = [], [], []  # numpy is slow at single numbers
        final: dict[int, tuple[Any, float]] = {}  # last observation and success of the rows that ended
        for row, (env, action) in enumerate(zip(self.envs, iterate(self.action_space, actions), strict=True)):
            obs, reward, is_terminated, is_truncated, info = env.step(action)
            rewards.append(reward)
            terminations.append(is_terminated)
            truncations.append(is_truncated)
            if is_terminated or is_truncated:  # an environment may write the next episode into the same array
                final[row] = map_leaves(np.copy, obs), info.get("success", np.nan)
                obs, _ = env.reset()
            observations.append(obs)
        try:
            batch = self._batched(observations)
            results = np.array(rewards, float), np.array(terminations, bool), np.array(truncations, bool)
            if not final:
                return batch, *results, {}
            last = [final[row][0] if row in final else obs for row, obs in enumerate(observations)]
            told = {"final_obs": self._batched(last)}
        except (ValueError, TypeError, KeyError) as exc:
            first = cast(GuardedEnv, self.envs[0])
            raise env_fault(exc, first.env_id, "an environment", "step", first.steps) from exc
        success = np.array([final[row][1] if row in final else np.nan for row in range(self.num_envs)])
        if not np.isnan(success).all():
            told["success"] = success
        return batch, *results, told

    def _batched(self, observations: list[Any]) -> Any:
        space = self.single_observation_space
        if isinstance(space, gym.spaces.Box):
            batch = np.array(observations, space.dtype)
            if batch.shape != self.observation_space.shape:
                raise ValueError(f"observations of {list(batch.shape[1:])}, the space is {list(space.shape)}")
            return batch
        empty: Any = create_empty_array(space, self.num_envs)
        return concatenate(space, observations, empty)


class _QuietAsyncVectorEnv(AsyncVectorEnv):
    """Without the worker's traceback in the log: the `UserError` that is raised says it in one line."""

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        level, gym.logger.min_level = gym.logger.min_level, gym.logger.ERROR + 1
        try:
            super()._raise_if_errors(successes)
        finally:
            gym.logger.min_level = level


def make_row(config: "EnvConfig", render_mode: str | None) -> gym.Env:
    """One environment, before it is batched."""
    register_package(config.id)
    try:
        with warnings.catch_warnings(record=True) as told:
            env = _make(config, render_mode)
        for warning in told:  # not beside the one line of an error
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        for wrapper in config.wrappers:
            env = _apply_wrapper(env, wrapper)
    except UserError:
        raise
    except (gym.error.UnregisteredEnv, gym.error.NamespaceNotFound) as exc:
        raise unknown_id(config.id, gym.registry, "gymnasium") from exc
    except gym.error.DeprecatedEnv as exc:
        raise UserError(f"{config.id} cannot be made: {cause_of(exc)}") from exc
    except Exception as exc:
        raise UserError(
            f"{config.id} cannot be made ({cause_of(exc)}): check env.kwargs and what the id needs"
        ) from exc
    return env


def is_mujoco(env_id: str) -> bool:
    """Whether the id is one of gymnasium's own MuJoCo environments."""
    spec = gym.registry.get(env_id)
    return spec is not None and str(spec.entry_point).startswith("gymnasium.envs.mujoco")


def _log_mujoco(text: str) -> None:
    """MuJoCo's own way is to print and to write MUJOCO_LOG.TXT wherever one stands."""
    is_about_xml = "compiler attribute" in text  # of gymnasium's files: nothing that a user could mend
    logging.getLogger("lit_rl.mujoco").log(logging.INFO if is_about_xml else logging.WARNING, text)


def register_package(env_id: str) -> None:
    """Import what registers the id with gymnasium, for the packages that gymnasium itself does not know."""
    if env_id.startswith("lit_rl/"):
        from lit_rl.testing.envs import register

        register()
    elif is_minigrid(env_id):
        import minigrid

        gym.register_envs(minigrid)
    elif is_atari(env_id):
        try:
            import ale_py
            import cv2  # noqa: F401 - AtariPreprocessing resizes with it
        except ImportError as exc:
            raise UserError(f"{env_id} needs an extra ({exc}): pip install 'lit-rl[atari]'") from exc
        gym.register_envs(ale_py)
    elif is_highway(env_id):
        try:
            import highway_env
        except ImportError as exc:
            raise UserError(f"{env_id} needs an extra ({exc}): pip install 'lit-rl[highway]'") from exc
        gym.register_envs(highway_env)
    elif is_mujoco(env_id):
        import mujoco

        mujoco.set_mju_user_warning(_log_mujoco)


def _make(config: "EnvConfig", render_mode: str | None) -> gym.Env:
    options = dict(config.kwargs)
    if render_mode is not None:  # not every constructor knows the word
        options["render_mode"] = render_mode
    if is_atari(config.id):
        return _make_atari(config, options)
    if is_highway(config.id):
        return make_highway(config, options)
    if is_minigrid(config.id):
        if config.time_limit is not None:  # its own limit, which the reward 1 - 0.9 t / max_steps knows of
            options["max_steps"] = config.time_limit
        return SymbolicView(gym.make(config.id, disable_env_checker=True, **options))
    return gym.make(config.id, max_episode_steps=config.time_limit, disable_env_checker=True, **options)


def _make_atari(config: "EnvConfig", options: dict[str, Any]) -> gym.Env:
    """Machado et al. (2018): up to 30 no-ops, 4 frames a step, maximum of the last two, 84 x 84 grey."""
    env = gym.make(config.id, frameskip=1, disable_env_checker=True, **options)
    env = gym.wrappers.AtariPreprocessing(env, grayscale_newaxis=True)
    if config.time_limit is not None:  # in agent steps: outside the frame skip
        env = gym.wrappers.TimeLimit(env, config.time_limit)
    return env


def _apply_wrapper(env: gym.Env, wrapper: str | dict[str, Any]) -> gym.Env:
    spec: dict[str, Any] = {"class_path": wrapper} if isinstance(wrapper, str) else wrapper
    if "class_path" not in spec or not set(spec) <= {"class_path", "init_args"}:
        raise UserError(
            f"env.wrappers: {wrapper} is neither a class path nor {{class_path, init_args}}: write it so"
        )
    module, _, name = spec["class_path"].rpartition(".")
    try:
        wrapper_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise UserError(
            f"env.wrappers: cannot import {spec['class_path']!r} ({exc}): check the class path"
        ) from exc
    try:
        return wrapper_class(env, **spec.get("init_args", {}))
    except Exception as exc:
        raise UserError(
            f"env.wrappers: {spec['class_path']} refuses ({cause_of(exc)}): check its init_args"
        ) from exc
