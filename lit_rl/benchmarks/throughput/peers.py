"""The settings of a configuration in stable-baselines3 and sb3-contrib, as far as these have them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from lit_rl.algorithms import LitDQN, LitPPO
from lit_rl.benchmarks.throughput.clock import Clock
from lit_rl.cli import LitRLCLI
from lit_rl.data import ReplayDataModule, RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.envs.wrappers import VELOCITY_FREE
from lit_rl.errors import UserError
from lit_rl.models.q_heads import ExpectedQ
from lit_rl.trunks import LSTM, MLP, Trunk


def stable_baselines3(run: LitRLCLI, seconds: float) -> dict[str, float]:
    """Steps a second of the whole loop.

    Raises:
        UserError: it has no such learner or environment.
    """
    learner = _learner(run)
    from stable_baselines3.common.callbacks import BaseCallback

    clock = Clock(seconds)

    class Stop(BaseCallback):
        learnt_from = 0

        def _on_rollout_start(self) -> None:  # the last one has been learnt from, if learning has begun
            if learner._n_updates:
                clock.batch(learner.num_timesteps - self.learnt_from)
            self.learnt_from = learner.num_timesteps

        def _on_step(self) -> bool:
            return not clock.is_over

    learner.learn(10**9, callback=Stop())
    return {"steps/s": clock.speed}


def _learner(run: LitRLCLI) -> Any:
    model, data = run.model, run.datamodule
    if isinstance(model, LitPPO):
        return _ppo(model, data)
    if isinstance(model, LitDQN):
        return _dqn(model, data)
    raise UserError(f"stable-baselines3 has no {type(model).__name__}: leave --peer out")


def _ppo(model: LitPPO, data: RolloutDataModule) -> Any:
    agent = model.agent
    options: dict[str, Any] = {
        "n_steps": data.rollout_length,
        "batch_size": data.env.num_envs * data.rollout_length // model.num_minibatches,
        "n_epochs": model.num_epochs,
        "gamma": model.gamma,
        "gae_lambda": model.gae_lambda,
        "clip_range": model.clip[0],
        "ent_coef": model.entropy_coef[0],
        "vf_coef": model.value_coef,
        "max_grad_norm": model.max_grad_norm,
        "learning_rate": model.lr,
        "device": "cpu",
    }
    if isinstance(agent.trunk, MLP) and agent.value_trunk is not None:
        from stable_baselines3 import PPO

        env = _environments(data.env, bool(agent.normalized), model.reward_scale is not None)
        return PPO("MlpPolicy", env, policy_kwargs=_layers(agent.trunk), **options)
    if isinstance(agent.trunk, LSTM) and agent.value_trunk is None:
        from sb3_contrib import RecurrentPPO

        lstm = {
            "lstm_hidden_size": agent.trunk.rnn.hidden_size,
            "n_lstm_layers": agent.trunk.rnn.num_layers,
            "shared_lstm": True,
            "enable_critic_lstm": False,
            "net_arch": [],
        }
        env = _environments(data.env, bool(agent.normalized), model.reward_scale is not None)
        return RecurrentPPO("MlpLstmPolicy", env, policy_kwargs=lstm, **options)
    raise _no_peer(agent.trunk, "PPO with separate MLPs or a shared LSTM")


def _dqn(model: LitDQN, data: ReplayDataModule) -> Any:
    agent = model.agent
    plain = isinstance(agent.head, ExpectedQ) and agent.head.hidden is None and agent.head.state_value is None
    if not (isinstance(agent.trunk, MLP) and plain) or model.loss.double or model.loss.n_step > 1:
        raise _no_peer(agent.trunk, "DQN with an MLP and nothing else: double: false, n_step: 1")
    if data.priority_exponent:
        raise UserError("stable-baselines3 has no prioritized replay: leave --peer out")
    from stable_baselines3 import DQN

    return DQN(
        "MlpPolicy",
        _environments(data.env, bool(agent.normalized), False),
        train_freq=data.steps_per_block,
        gradient_steps=model.updates_per_block,
        batch_size=model.batch_size,
        buffer_size=data.buffer_size,
        learning_starts=model.learning_starts,
        target_update_interval=model.target_update_frames,
        exploration_fraction=1e-6,
        exploration_final_eps=model.exploration_rate[1],
        gamma=model.loss.gamma,
        max_grad_norm=model.max_grad_norm,
        learning_rate=model.lr,
        policy_kwargs=_layers(agent.trunk),
        device="cpu",
    )


def _layers(trunk: MLP) -> dict[str, Any]:
    """The layers of `trunk`; the peer makes one set of them for policy and value each."""
    import torch
    from torch import nn

    activations = {torch.tanh: nn.Tanh, torch.relu: nn.ReLU}
    if trunk.activation not in activations:
        raise UserError("a peer's MLP has tanh or relu: leave --peer out, or choose one of them")
    widths = [trunk.out_features] * len(trunk.layers)
    return {"net_arch": widths, "activation_fn": activations[trunk.activation]}


def _environments(config: EnvConfig, observations: bool, rewards: bool) -> Any:
    """In one process, with what of `config` the peer can do; normalised where that is asked for."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    known = EnvConfig(config.id, config.num_envs, kwargs=config.kwargs, mask_velocity=config.mask_velocity)
    if config != known:
        raise UserError(f"the peer has no such form of {config.id}: use gymnasium's, without wrappers")
    keep = VELOCITY_FREE[config.id.rpartition("-v")[0]] if config.mask_velocity else None

    def make() -> gym.Env:
        env = gym.make(config.id, **config.kwargs)
        return env if keep is None else _Masked(env, keep)

    env = make_vec_env(make, n_envs=config.num_envs, seed=0)
    if observations or rewards:
        env = VecNormalize(env, norm_obs=observations, norm_reward=rewards)
    return env


class _Masked(gym.ObservationWrapper):
    def __init__(self, env: gym.Env, keep: list[int]) -> None:
        super().__init__(env)
        self.keep = keep
        space: Any = env.observation_space
        self.observation_space = gym.spaces.Box(space.low[keep], space.high[keep], dtype=space.dtype)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[self.keep]


def _no_peer(trunk: Trunk, known: str) -> UserError:
    return UserError(
        f"stable-baselines3 has no learner of this kind on {type(trunk).__name__} (it has {known}): "
        "leave --peer out"
    )
