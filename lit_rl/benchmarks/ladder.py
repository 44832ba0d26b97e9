"""The memory ladder: how far back a trunk learns to remember (``lit-rl trunks check NAME --learn``).

PPO learns `lit_rl/Recall-v0` (a cue, k blank steps, then the question) with k = 8, 32 and 128, for the trunk
in question beside `mlp`, which cannot, and others. One of four cues: chance is 0.25.

One setting serves every architecture; only gamma and the budget go with k. A rollout is one episode of each
environment, so that the gradient reaches the cue. Because gamma < 1, the value of a blank step depends on how
far the question is: learning to count gives a memory its use long before any answer is better than chance.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_rl.algorithms import LitPPO
from lit_rl.benchmarks.measure import (
    Contender,
    check_csv,
    interleaved,
    markdown,
    num_parameters,
    state_bytes,
    write_csv,
)
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError, check_range, refused

CUES = 4
NUM_ENVS = 64
D_MODEL = 64
EVALUATIONS = 20  # of a run that uses its whole budget
EPISODES = 100  # of an evaluation, greedy
PEERS = ("mlp", "gru", "mamba2")

INTRODUCTION = (
    f"PPO on lit_rl/Recall-v0: one of {CUES} cues (chance {1 / CUES:.2f}), k blank steps, the question; "
    f"d_model {D_MODEL}, {NUM_ENVS} environments.\n"
    f"success: of the last greedy evaluation, {EPISODES} episodes; a run ends before its budget where "
    "an evaluation is without a mistake."
)


@dataclass(frozen=True)
class Rung:
    """A number of blank steps, and what a run of it may cost."""

    delay: int
    frames: int
    gamma: float


RUNGS = (Rung(8, 200_000, 0.95), Rung(32, 1_500_000, 0.95), Rung(128, 2_000_000, 0.99))


@dataclass(frozen=True)
class Climb:
    """What came of one trunk on one rung."""

    trunk: str
    k: int
    success: float
    """Share of right answers in the last evaluation."""
    frames: int
    """Trained for."""
    steps_per_second: float
    """Collecting and learning, without evaluations."""
    action_ms: float
    """One action of one environment, by the whole agent."""
    parameters: int
    """Of the trunk."""
    state_bytes: int
    """Of the trunk's memory, an environment."""


class Watch(L.Callback):
    """Times training without its evaluations, and ends it when an evaluation is without a mistake."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.success = 0.0
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.perf_counter() - self._started

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.success = round(float(trainer.callback_metrics["val/success"]), 4)  # of float32
        if self.success == 1.0:
            trainer.should_stop = True


def climb(contender: Contender, rung: Rung, seed: int) -> Climb:
    """Trains one trunk on one rung.

    Raises:
        UserError: the trunk cannot be built, or its loss is not finite.
    """
    L.seed_everything(seed, verbose=False)
    env = EnvConfig("lit_rl/Recall-v0", num_envs=NUM_ENVS, kwargs={"delay": rung.delay, "cues": CUES})
    model = LitPPO(
        env,
        partial(contender.trunk, **contender.options),
        total_frames=rung.frames,
        num_epochs=4,
        num_minibatches=8,
        gamma=rung.gamma,
        gae_lambda=0.95,
        entropy_coef=0.05,
        lr=3e-3,
        anneal_lr=False,
        normalize_reward=True,  # discounted over k steps it is too small to learn a value from
    )
    data = RolloutDataModule(
        env,
        rollout_length=rung.delay + 2,
        frames_per_epoch=max(1, rung.frames // EVALUATIONS),
        episodes=EPISODES,
        seed=seed,
    )
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return Climb(
        trunk=contender.name,
        k=rung.delay,
        success=watch.success,
        frames=model.frames,
        steps_per_second=model.frames / watch.seconds,
        action_ms=1e3 * _seconds_an_action(model),
        parameters=num_parameters(model.agent.trunk),
        state_bytes=state_bytes(model.agent.trunk),
    )


def _seconds_an_action(model: LitPPO) -> float:
    agent = model.agent.eval()
    observation, is_init = torch.zeros(1, CUES + 2), torch.zeros(1, dtype=torch.bool)
    state = agent.initial_state(1)
    act = partial(agent.act, observation, state, is_init, greedy=True)
    return interleaved({"act": act}, rounds=20, calls=10)["act"]


def with_peers(name: str, options: Mapping[str, Any]) -> Iterator[Contender]:
    """The trunk in question with its options, then those of `PEERS` that are installed."""
    given = [f"{key}={value}" for key, value in options.items()]
    question = Contender.named(name, **options).with_usual(d_model=D_MODEL)
    yield replace(question, name=" ".join([name, *given]))
    for peer in PEERS:
        if peer == name and not options:
            continue
        try:
            yield Contender.named(peer).with_usual(d_model=D_MODEL)
        except UserError as reason:
            print(f"left out: {reason}", flush=True)


def table(climbs: Sequence[Climb]) -> list[dict[str, Any]]:
    """A row for each trunk; steps/s over all its rungs."""
    rows = []
    for name in dict.fromkeys(one.trunk for one in climbs):
        mine = [one for one in climbs if one.trunk == name]
        seconds = sum(one.frames / one.steps_per_second for one in mine)
        rows.append(
            {
                "trunk": name,
                **{f"success k={one.k}": f"{one.success:.2f}" for one in mine},
                "steps/s": sum(one.frames for one in mine) / seconds,
                "ms an action": min(one.action_ms for one in mine),
                "parameters": mine[0].parameters,
                "state bytes": mine[0].state_bytes,
            }
        )
    return rows


def run(
    contenders: Iterable[Contender],
    *,
    rungs: Sequence[Rung] = RUNGS,
    seed: int = 1,
    frames: int | None = None,
    csv: Path | None = None,
) -> None:
    """Trains every contender on every rung and prints the table.

    Args:
        contenders: trunks with their options.
        rungs: how far back to remember.
        seed: of weights, environments and actions.
        frames: the budget of every run, instead of the rungs' own.
        csv: where all runs are kept, a line each.

    Raises:
        UserError: see `climb`.
    """
    check_csv(csv)
    check_range({"frames": frames}, 1)
    check_range({"seed": seed}, 0, 2**31 - 1)
    torch.set_num_threads(1)
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    print(INTRODUCTION, flush=True)
    climbs = []
    for contender in contenders:
        for rung in rungs:
            one = climb(contender, replace(rung, frames=frames or rung.frames), seed)
            climbs.append(one)
            print(
                f"{one.trunk}, k={one.k}: success {one.success:.2f} after {one.frames:,} frames, "
                f"{one.steps_per_second:,.0f} steps/s",
                flush=True,
            )
            if csv is not None:
                write_csv(csv, [asdict(one) for one in climbs])
    print(f"\n{markdown(table(climbs))}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The memory ladder for any trunks: no peers are added.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--k", type=int, nargs="+", choices=[rung.delay for rung in RUNGS], help="rungs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="where all runs are kept")
    arguments = parser.parse_args(argv)
    rungs = [rung for rung in RUNGS if arguments.k is None or rung.delay in arguments.k]
    try:
        named = [Contender.named(name).with_usual(d_model=D_MODEL) for name in arguments.names]
        run(named, rungs=rungs, seed=arguments.seed, csv=arguments.csv)
    except UserError as error:
        return refused("ladder", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
