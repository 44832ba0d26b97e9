"""Memory that collecting a rollout takes: ``python -m lit_rl.benchmarks.rollout_memory [NAMES]``.

A rollout of PPO is 8 environments x 128 steps of CartPole-v1; trunks have d_model 256, 4 layers and a memory
of 128 steps where they know these words. Each collects in a process of its own; what is told is how far that
process's resident memory rises during three rollouts (Linux only).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lit_rl.benchmarks.measure import Contender, check_csv, markdown, state_bytes, write_csv
from lit_rl.collectors import RolloutCollector
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError, refused
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.trunks import MLP

NUM_ENVS, ROLLOUT_LENGTH, ROLLOUTS = 8, 128, 3
USUAL = {"d_model": 256, "n_layers": 4, "memory": 128}
DEFAULT = ("mlp", "transformer_xl")


def resident(line: str) -> int:
    """Bytes of this process, as Linux tells them: `VmRSS` now, `VmHWM` at most since `forget_peak`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(entry.split()[1]) * 1024 for entry in status if entry.startswith(line))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def rise(contender: Contender) -> int:
    """Bytes that three rollouts add to this process at most."""
    env = EnvConfig("CartPole-v1", num_envs=NUM_ENVS)
    small = ActorCritic(*env.spaces(), partial(MLP, d_model=8))
    RolloutCollector(env.make, small, frames_per_batch=64).rollout()  # numba and its loops are loaded once
    agent = ActorCritic(*env.spaces(), partial(contender.trunk, **contender.options))
    collector = RolloutCollector(env.make, agent, frames_per_batch=NUM_ENVS * ROLLOUT_LENGTH)
    forget_peak()
    before = resident("VmRSS")
    for _ in range(ROLLOUTS):
        collector.rollout()
    return resident("VmHWM") - before


def in_a_process(name: str) -> int:
    """What `rise` tells of a trunk in a process of its own."""
    command = [sys.executable, "-m", "lit_rl.benchmarks.rollout_memory", name, "--only"]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", default=DEFAULT, metavar="NAMES")
    parser.add_argument("--only", action="store_true", help="in this process: print the bytes of one trunk")
    parser.add_argument("--csv", type=Path, help="where the table is kept")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)
    try:
        check_csv(arguments.csv)
        trunks = [Contender.named(name).with_usual(**USUAL) for name in arguments.names]
        state_sizes = [state_bytes(contender.build(4)) for contender in trunks]
    except UserError as error:
        return refused("rollout_memory", error)
    if arguments.only:
        print(rise(trunks[0]))
        return 0
    rows = [
        {
            "trunk": contender.name,
            "rollout MB": round(in_a_process(contender.name) / 1e6, 1),
            "state MB, all environments": round(NUM_ENVS * one_state / 1e6, 1),
        }
        for contender, one_state in zip(trunks, state_sizes, strict=True)
    ]
    print(markdown(rows))
    if arguments.csv is not None:
        write_csv(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
