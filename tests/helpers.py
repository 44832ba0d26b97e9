"""What several tests build: scripted environments, small agents, quiet Trainers."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from gymnasium import spaces
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from lit_rl import registry
from lit_rl.algorithms import LitPPO
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.models.agent import ActorCritic, TrunkFactory

COUNTER = "lit_rl/Counter-v0"


def counter(
    num_envs: int = 2, lengths: Sequence[int] = (3, 5), truncations: Sequence[bool] = (False, True)
) -> EnvConfig:
    """Episodes of known lengths and ends, observation (episode, t), reward t + 1."""
    kwargs = {"lengths": list(lengths), "truncations": list(truncations)}
    return EnvConfig(COUNTER, num_envs=num_envs, kwargs=kwargs)


def small(name: str) -> TrunkFactory:
    """A trunk of width 8 by its registered name."""
    return lambda in_features: registry.load(name)(in_features, d_model=8)


def installed_trunks() -> list[str]:
    return sorted({entry.name for entry in registry.entries() if ":" in entry.target})


def make_agent(env: EnvConfig, trunk: str = "mlp", *, seed: int = 0, **options: Any) -> ActorCritic:
    """An agent whose policy and values are clearly not flat, as they would be at initialisation."""
    torch.manual_seed(seed)
    agent = ActorCritic(*env.spaces(), small(trunk), **options)
    sharpen(agent)
    return agent


@torch.no_grad()
def sharpen(agent: ActorCritic) -> None:
    """Larger weights of the policy head, which starts near zero: actions then depend on what is seen."""
    for name, parameter in agent.policy.named_parameters():
        if name.endswith("weight"):
            parameter.mul_(100.0)


def ppo(env: EnvConfig, trunk: str = "mlp", **options: Any) -> LitPPO:
    return LitPPO(env, small(trunk), **options)


class Records(DummyLogger):
    """A logger that keeps its records: (frames, metrics)."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        assert step is not None
        self.records.append((step, dict(metrics)))

    def series(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.records if key in metrics]


def make_trainer(**options: Any) -> L.Trainer:
    """A silent Trainer on the CPU that ends where the algorithm says so."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(quiet | options))


def train(
    env: EnvConfig,
    trunk: str = "mlp",
    *,
    rollouts: int = 1,
    rollout_length: int = 16,
    sequence_length: int | None = None,
    seed: int = 0,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[LitPPO, Records]:
    """Some rollouts of PPO: the learner after them and what it logged."""
    torch.manual_seed(seed)
    frames = env.num_envs * rollout_length
    model = ppo(env, trunk, **({"total_frames": rollouts * frames, "num_minibatches": 2} | options))
    sharpen(model.agent)
    data = RolloutDataModule(
        env,
        rollout_length=rollout_length,
        sequence_length=sequence_length,
        frames_per_epoch=frames,
        seed=seed,
    )
    records = Records()
    make_trainer(logger=records, **(trainer or {})).fit(model, data)
    return model, records


def parameters(module: torch.nn.Module) -> Tensor:
    """All parameters as one vector, copied."""
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def sample(space: spaces.Space, *batch: int, seed: int = 0) -> Any:
    """Random elements of a space as tensors ``[*batch, ...]`` (a mapping for a Dict space)."""
    space.seed(seed)
    if isinstance(space, spaces.Dict):
        return {key: sample(part, *batch, seed=seed) for key, part in space.spaces.items()}
    count = int(torch.tensor(batch).prod())
    return torch.stack([torch.as_tensor(space.sample()) for _ in range(count)]).unflatten(0, batch)
