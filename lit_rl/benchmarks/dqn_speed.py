"""DQN on CartPole-v1 beside stable-baselines3: ``python -m lit_rl.benchmarks.dqn_speed``.

The same settings: one environment, 128 optimizer steps of 64 transitions after every 256 environment steps
(rl-zoo3's), a replay of 100,000, a 256 x 256 ReLU network, one torch thread. What happens before the first
optimizer step is not counted. Ours writes TensorBoard records as every run does; the peer logs nothing.
"""

from __future__ import annotations

from functools import partial

from lit_rl.algorithms import LitDQN
from lit_rl.benchmarks import pairs
from lit_rl.data import ReplayDataModule
from lit_rl.envs import EnvConfig
from lit_rl.trunks import MLP

BLOCK, UPDATES, BATCH, BUFFER = 256, 128, 64, 100_000
LEARNING_STARTS = 1_024
WARM_UP = LEARNING_STARTS // BLOCK + 2  # blocks


def steps_per_second(marks: list[float]) -> float:
    """Of the times at which blocks had been learnt from, without the warm-up."""
    return (len(marks) - WARM_UP) * BLOCK / (marks[-1] - marks[WARM_UP - 1])


def ours(frames: int, seed: int, *, double: bool = False) -> float:
    env = EnvConfig("CartPole-v1", num_envs=1)
    model = LitDQN(
        env,
        partial(MLP, d_model=256, n_layers=2, activation="relu"),
        total_frames=frames,
        batch_size=BATCH,
        updates_per_block=UPDATES,
        learning_starts=LEARNING_STARTS,
        target_update_frames=BLOCK,
        double=double,
    )
    data = ReplayDataModule(
        env, steps_per_block=BLOCK, buffer_size=BUFFER, frames_per_epoch=frames, seed=seed
    )
    return steps_per_second(pairs.times_of_fit(model, data))


def stable_baselines3(frames: int, seed: int) -> float:
    from stable_baselines3 import DQN

    model = DQN(
        "MlpPolicy",
        "CartPole-v1",
        train_freq=BLOCK,
        gradient_steps=UPDATES,
        batch_size=BATCH,
        buffer_size=BUFFER,
        learning_starts=LEARNING_STARTS,
        target_update_interval=BLOCK,
        policy_kwargs={"net_arch": [256, 256]},
        seed=seed,
        device="cpu",
    )
    return steps_per_second(pairs.times_of_learn(model, frames))


def ours_double(frames: int, seed: int) -> float:
    return ours(frames, seed, double=True)


PEER = "stable-baselines3"
RUNS: dict[str, pairs.SpeedOf] = {"lit_rl": ours, "lit_rl double": ours_double, PEER: stable_baselines3}

if __name__ == "__main__":
    pairs.main("lit_rl.benchmarks.dqn_speed", RUNS, PEER, pairs=5, frames=20_000)
