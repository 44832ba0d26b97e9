"""What drawing from a full replay costs: ``python -m lit_rl.benchmarks.replay_speed``.

100,000 windows of LunarLander-v3 (10 steps and one more to bootstrap from), prioritized: one draw of 64
windows and one update of their priorities, on one thread; median and 95th percentile of many.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from lit_rl import keys
from lit_rl.collectors import WindowCollector
from lit_rl.data.window_replay import WindowReplay
from lit_rl.envs import EnvConfig
from lit_rl.models.q_heads import ExpectedQ
from lit_rl.models.q_network import QNetwork
from lit_rl.trunks import MLP

WINDOW, BATCH = 10, 64


def full_replay(windows: int, storage: str) -> WindowReplay:
    """A replay with so many windows of random play."""
    env = EnvConfig("LunarLander-v3", num_envs=8)
    agent = QNetwork(*env.spaces(), MLP, ExpectedQ)
    agent.exploration_rate = 1.0
    collector = WindowCollector(env.make, agent, window=WINDOW, frames_per_batch=2_048)
    replay = WindowReplay(windows, alpha=0.6, storage=storage)  # type: ignore[arg-type]
    while len(replay) < windows:
        replay.extend(collector.rollout()[keys.WINDOWS])
    collector.shutdown()
    return replay


def milliseconds(replay: WindowReplay, rounds: int) -> np.ndarray:
    """Of `rounds` draws with their updates."""
    priorities = torch.rand(rounds, BATCH) + 0.1
    times = np.zeros(rounds)
    for index in range(rounds):
        start = time.perf_counter()
        drawn = replay.sample(BATCH, beta=0.4)
        replay.update_priority(drawn.indices, priorities[index])
        times[index] = time.perf_counter() - start
    return times * 1e3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What drawing from a full replay costs.")
    parser.add_argument("--windows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2_000)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    for storage in ("memory", "disk"):
        times = milliseconds(full_replay(arguments.windows, storage), arguments.rounds)
        print(
            f"{storage}: {arguments.windows:,} windows of {WINDOW} steps, draw {BATCH} and update their "
            f"priorities: median {np.median(times):.2f} ms, 95 % below {np.percentile(times, 95):.2f} ms"
        )


if __name__ == "__main__":
    main()
