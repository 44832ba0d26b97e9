"""Two processes on the CPU, each with a replay of its own, train one Q-network."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import small
from processes import DDP, LIT_RL, distance, found, launch
from tensordict import TensorDict

from lit_rl.algorithms import LitDQN
from lit_rl.data.window_replay import Drawn
from lit_rl.envs import EnvConfig

BATCH = 8
LEARNING: dict[str, Any] = {
    "total_frames": 256,
    "learning_starts": 64,
    "batch_size": BATCH,
    "updates_per_block": 2,
    "tau": 0.1,  # every update moves the target network
    "max_grad_norm": 0.3,  # often reached
    "exploration_frames": 1_000,
    "lr": 0.003,
}
TRUNKS: dict[str, dict[str, Any]] = {  # the first learns without autograd
    "mlp": {},
    "gru": {"window": 4, "loss_steps": 1, "context": "stored"},  # one step a window, so that all count alike
}


@pytest.mark.parametrize("trunk", TRUNKS)
def test_an_update_is_that_of_one_process_with_all_windows(tmp_path: Path, trunk: str) -> None:
    learning = LEARNING | TRUNKS[trunk]
    options = [
        "fit",
        "--model=LitDQN",
        "--data=ReplayDataModule",
        "--env.id=CartPole-v1",
        "--env.num_envs=2",
        "--data.frames_per_epoch=128",
        "--data.priority_exponent=0.6",
        "--data.stride=1",
        "--episodes=1",
        f"--model.trunk={trunk}",
        "--model.trunk.d_model=8",
        *(f"--model.{key}={value}" for key, value in learning.items()),
        "--trainer.callbacks=[{class_path: dqn_probes.Drawings, init_args: {folder: found}}]",
    ]
    done = launch(tmp_path, [*LIT_RL, *options, *DDP])
    assert done.returncode == 0, done.stderr
    one, other = found(tmp_path / "found")
    assert len(one["drawn"]) == len(other["drawn"]) > 20
    assert distance(one["end"], other["end"]) == 0
    together = [drawn(mine, theirs) for mine, theirs in zip(one["drawn"], other["drawn"], strict=True)]
    assert distance(learn_alone(trunk, learning, one["start"], together), one["end"]) < 1e-5
    # Negative control: the windows of one process tell something else.
    alone = [drawn(mine) for mine in one["drawn"]]
    assert distance(learn_alone(trunk, learning, one["start"], alone), one["end"]) > 1e-2


def drawn(*parts: tuple[dict[str, Any], torch.Tensor]) -> Drawn:
    windows = [TensorDict(content, [BATCH]) for content, _ in parts]
    weight = torch.cat([weight for _, weight in parts])
    return Drawn(torch.cat(windows), weight, torch.arange(len(weight)))


def learn_alone(
    trunk: str, options: dict[str, Any], start: dict[str, torch.Tensor], batches: list[Drawn]
) -> dict[str, torch.Tensor]:
    """The state after one process has learnt from these batches."""
    model = LitDQN(EnvConfig("CartPole-v1"), small(trunk), **options)
    model.load_state_dict(start)
    trainer: Any = SimpleNamespace(optimizers=[model.configure_optimizers()])
    model.trainer = trainer
    model._learning_parameters = list(model.agent.parameters())
    for batch in batches:
        model._update(model.loss.lesson(model.target, batch), None)
    return model.state_dict()
