"""What a configuration may ask for: each refusal is one line with the way out."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.errors import UserError, check_range

if TYPE_CHECKING:
    from lit_rl.envs.config import EnvConfig

HIGHWAY_ID = re.compile(
    "(highway|merge|roundabout|intersection|exit|two-way|u-turn|lane-keeping|racetrack|parking)"
    r"(-[A-Za-z-]+)?-v\d+"
)


def check_config(config: "EnvConfig", num_envs: int) -> None:
    """Refuse values that no environment could take."""
    for count in (config.num_envs, num_envs):
        check_range({"env.num_envs": count}, 1, 2**16)
    check_range({"env.frame_stack": config.frame_stack}, 1, 1024)
    check_range({"env.time_limit": config.time_limit}, 1, 2**31 - 1)
    check_range({"env.reward_delay": config.reward_delay}, 0, 2**31 - 1)
    check_range({"env.observation_noise": config.observation_noise}, 0)
    if config.backend not in ("gymnasium", "envpool"):
        raise UserError(f"env.backend is {config.backend!r}: choose gymnasium or envpool")
    if config.vectorization not in ("sync", "async"):
        raise UserError(f"env.vectorization is {config.vectorization!r}: choose sync or async")
    if config.view_size is not None and not is_minigrid(config.id):
        raise UserError(f"env.view_size is for MiniGrid, not {config.id}: remove it")
    if is_minigrid(config.id) and "agent_view_size" in config.kwargs:
        raise UserError(
            "env.kwargs.agent_view_size is not the same on all backends: use env.view_size (3, 5, 7)"
        )
    if config.backend == "envpool" and config.wrappers:
        raise UserError(
            "env.wrappers wrap single gymnasium environments, which EnvPool does not have: "
            "remove them or choose env.backend: gymnasium"
        )
    if config.backend == "envpool" and config.vectorization == "async":
        raise UserError(
            "env.vectorization: async is for the gymnasium backend, EnvPool has its own threads: remove it"
        )


def cause_of(exc: Exception) -> str:
    """Type and message of an exception on one line, cut where an extension module writes a page."""
    text = " ".join(f"{type(exc).__name__}: {exc}".split())
    return text if len(text) <= 300 else text[:300] + " ..."


def is_minigrid(env_id: str) -> bool:
    """Whether the id names an environment of the `minigrid` package."""
    return env_id.startswith(("MiniGrid-", "BabyAI-"))


def is_atari(env_id: str) -> bool:
    """Whether the id names an environment of the `ale_py` package."""
    return env_id.startswith("ALE/")


def is_highway(env_id: str) -> bool:
    """Whether the id names an environment of the `highway-env` package."""
    return HIGHWAY_ID.fullmatch(env_id) is not None


def unknown_id(env_id: str, known: Iterable[str], backend: str) -> UserError:
    """The refusal of an id that the backend does not know, with the close matches."""
    close = difflib.get_close_matches(env_id, list(known), n=3, cutoff=0.6)
    hint = (
        f"did you mean {', '.join(close)}?" if close else "check the spelling and which package registers it"
    )
    return UserError(f"unknown environment {env_id!r} (backend {backend}): {hint}")


def check_spaces(env_id: str, observation: gym.Space, action: gym.Space) -> None:
    """Refuse spaces that encoders and heads have no form for."""
    leaves = observation.spaces if isinstance(observation, spaces.Dict) else {"": observation}
    if not leaves or any(0 in (space.shape or ()) for space in leaves.values()):
        raise _unsupported(env_id, "observation", "", observation, "spaces that hold something")
    for key, space in leaves.items():
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise _unsupported(
                env_id, "observation", key, space, "Box, Discrete, MultiDiscrete, MultiBinary, Dict of these"
            )
        if isinstance(space, spaces.Discrete) and space.start != 0:
            raise _unsupported(env_id, "observation", key, space, "Discrete from 0")
    if isinstance(action, spaces.Box) and np.issubdtype(action.dtype, np.floating):
        return
    if isinstance(action, spaces.MultiDiscrete) and action.nvec.ndim == 1 and not action.start.any():
        return
    if isinstance(action, spaces.MultiBinary) and len(action.shape) == 1:
        return
    if not isinstance(action, spaces.Discrete):
        supported = "Discrete, flat MultiDiscrete from 0, flat MultiBinary, floating Box"
        raise _unsupported(env_id, "action", "", action, supported)


def check_observation(space: gym.Space, observation: Any) -> None:
    """Raises ValueError where an observation has another form than its space; its bounds are not asked."""
    if isinstance(space, spaces.Dict):
        if not isinstance(observation, Mapping) or observation.keys() != space.spaces.keys():
            keys = list(observation) if isinstance(observation, Mapping) else type(observation).__name__
            raise ValueError(f"the observation is {keys}, its space has the keys {list(space.spaces)}")
        for key, part in space.spaces.items():
            check_observation(part, observation[key])
        return
    array = np.asarray(observation)
    if array.shape != space.shape or array.dtype.kind not in "fiub":
        raise ValueError(
            f"the observation is {array.dtype} {list(array.shape)}, its space {list(space.shape or ())}"
        )
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        most = space.n if isinstance(space, spaces.Discrete) else space.nvec
        if not ((array >= space.start) & (array < space.start + most)).all():
            raise ValueError(f"the observation is {observation}, its space {space}")


def check_scalars(**values: Any) -> None:
    """Raises ValueError for a value that is no single number."""
    for name, value in values.items():
        if np.ndim(value):
            raise ValueError(f"{name} has the shape {list(np.shape(value))}, not that of a number")


def _unsupported(env_id: str, kind: str, key: str, space: gym.Space, supported: str) -> UserError:
    where = f"{kind} space {key!r}" if key else f"{kind} space"
    shown = " ".join(str(space).split())[:120]
    return UserError(
        f"{env_id}: unsupported {where}: {type(space).__name__} {shown}; supported: {supported}. "
        "Convert it with a wrapper in env.wrappers (gymnasium backend)"
    )
