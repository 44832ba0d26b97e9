"""PPO on CartPole-v1 beside stable-baselines3: ``python -m lit_rl.benchmarks.ppo_speed``.

The same settings (8 environments x 128 steps, 4 epochs of 4 minibatches, separate 64 x 64 tanh networks,
one torch thread), turn about in one process. A run's first rollouts are not counted. Ours writes
TensorBoard records as every run does; the peer logs nothing.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rl.algorithms import LitPPO
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig

NUM_ENVS, ROLLOUT_LENGTH = 8, 128
WARM_UP = 5  # rollouts


class Clock(L.Callback):
    """Steps a second of a fit, after the warm-up."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.marks.append(time.perf_counter())

    @property
    def steps_per_second(self) -> float:
        rollouts = len(self.marks) - WARM_UP
        return rollouts * NUM_ENVS * ROLLOUT_LENGTH / (self.marks[-1] - self.marks[WARM_UP - 1])


def ours(frames: int, seed: int) -> float:
    env = EnvConfig("CartPole-v1", num_envs=NUM_ENVS)
    clock = Clock()
    with tempfile.TemporaryDirectory() as logs:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            limit_val_batches=0,
            logger=TensorBoardLogger(logs),
            callbacks=[clock],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = RolloutDataModule(env, rollout_length=ROLLOUT_LENGTH, frames_per_epoch=frames, seed=seed)
        trainer.fit(LitPPO(env, total_frames=frames, value_trunk="separate", lr=1e-3), data)
    return clock.steps_per_second


def stable_baselines3(frames: int, seed: int) -> float:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class PeerClock(BaseCallback):
        def _init_callback(self) -> None:
            self.marks: list[float] = []

        def _on_rollout_start(self) -> None:
            self.marks.append(time.perf_counter())

        def _on_step(self) -> bool:
            return True

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
    clock = PeerClock()
    model.learn(frames, callback=clock)
    marks = [*clock.marks, time.perf_counter()]
    rollouts = len(marks) - 1 - WARM_UP
    return rollouts * NUM_ENVS * ROLLOUT_LENGTH / (marks[-1] - marks[WARM_UP])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--frames", type=int, default=60_000)
    parser.add_argument("--csv", type=Path, help="where the pairs are kept")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    rows = []
    for pair in range(arguments.pairs):
        mine, peer = ours(arguments.frames, pair), stable_baselines3(arguments.frames, pair)
        rows.append((pair, round(mine), round(peer), round(mine / peer, 2)))
        print(f"pair {pair}: lit_rl {mine:,.0f}, stable-baselines3 {peer:,.0f} steps/s: {mine / peer:.2f} x")
    ratios = [row[3] for row in rows]
    print(f"ratio: median {statistics.median(ratios)}, min {min(ratios)}, max {max(ratios)}")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("pair", "lit_rl", "stable-baselines3", "ratio"), *rows])


if __name__ == "__main__":
    main()
