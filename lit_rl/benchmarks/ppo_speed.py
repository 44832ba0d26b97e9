"""PPO on CartPole-v1 beside stable-baselines3: ``python -m lit_rl.benchmarks.ppo_speed``.

The same settings: 8 environments x 128 steps, 4 epochs of 4 minibatches, separate 64 x 64 tanh networks,
one torch thread. A run's first rollouts are not counted. Ours writes TensorBoard records as every run does;
the peer logs nothing.
"""

from __future__ import annotations

from typing import Any

from lit_rl.algorithms import LitPPO
from lit_rl.benchmarks import pairs
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig

NUM_ENVS, ROLLOUT_LENGTH = 8, 128
WARM_UP = 5  # rollouts


def steps_per_second(marks: list[float]) -> float:
    """Of the times at which rollouts had been learnt from, without the warm-up."""
    rollouts = len(marks) - WARM_UP
    return rollouts * NUM_ENVS * ROLLOUT_LENGTH / (marks[-1] - marks[WARM_UP - 1])


def ours(frames: int, seed: int, **options: Any) -> float:
    env = EnvConfig("CartPole-v1", num_envs=NUM_ENVS)
    data = RolloutDataModule(env, rollout_length=ROLLOUT_LENGTH, frames_per_epoch=frames, seed=seed)
    model = LitPPO(env, total_frames=frames, value_trunk="separate", lr=1e-3, **options)
    return steps_per_second(pairs.times_of_fit(model, data))


def stable_baselines3(frames: int, seed: int) -> float:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    model = PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=NUM_ENVS),
        n_steps=ROLLOUT_LENGTH,
        batch_size=NUM_ENVS * ROLLOUT_LENGTH // 4,
        n_epochs=4,
        learning_rate=1e-3,
        ent_coef=0.01,
        seed=seed,
        device="cpu",
    )
    return steps_per_second(pairs.times_of_learn(model, frames))


def ours_compiled(frames: int, seed: int) -> float:
    return ours(frames, seed, compile_loss=True)


PEER = "stable-baselines3"
RUNS = {"lit_rl": ours, "lit_rl compile_loss": ours_compiled, PEER: stable_baselines3}


if __name__ == "__main__":
    pairs.main("lit_rl.benchmarks.ppo_speed", RUNS, PEER, pairs=7, frames=60_000)
