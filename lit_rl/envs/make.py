"""Build the batched environment of an `EnvConfig`: the backend, then the wrappers that backends share."""

from typing import TYPE_CHECKING

from gymnasium import spaces
from gymnasium.vector import VectorEnv

from lit_rl.envs import wrappers
from lit_rl.envs.checks import check_config, check_spaces, is_minigrid
from lit_rl.envs.minigrid import NATIVE_VIEW, MiniGridView
from lit_rl.errors import UserError

if TYPE_CHECKING:
    from lit_rl.envs.config import EnvConfig


def make_vector_env(
    config: "EnvConfig", num_envs: int, seed: int | None, render_mode: str | None
) -> VectorEnv:
    """See `EnvConfig.make`."""
    check_config(config, num_envs)
    if config.backend == "envpool":
        from lit_rl.envs.envpool import make_envpool

        env = make_envpool(config, num_envs, seed, render_mode)
    else:
        from lit_rl.envs.gymnasium import make_gymnasium

        env = make_gymnasium(config, num_envs, seed, render_mode)
    try:
        check_spaces(config.id, env.single_observation_space, env.single_action_space)
        env = _wrap(env, config, seed)
    except UserError:
        env.close()
        raise
    env.action_space.seed(seed)
    return env


def _wrap(env: VectorEnv, config: "EnvConfig", seed: int | None) -> VectorEnv:
    """The wrappers that are asked for, from the environment outwards."""
    if wrappers.StandardForm.needed(env.single_observation_space):
        env = wrappers.StandardForm(env)
    if is_minigrid(config.id):
        env = MiniGridView(env, NATIVE_VIEW if config.view_size is None else config.view_size)
    if config.actions is not None:
        env = wrappers.ActionSubset(env, config.id, config.actions)
    elif isinstance(env.single_action_space, spaces.Discrete) and env.single_action_space.start != 0:
        space = env.single_action_space
        env = wrappers.ActionSubset(env, config.id, list(range(int(space.start), int(space.start + space.n))))
    if config.mask_velocity:
        env = wrappers.MaskVelocity(env, config.id)
    if config.reward_delay > 0:
        env = wrappers.DelayedReward(env, config.reward_delay)
    if config.observation_noise > 0:
        env = wrappers.ObservationNoise(env, config.id, config.observation_noise, seed)
    if config.frame_stack > 1:
        env = wrappers.FrameStack(env, config.frame_stack)
    return env
