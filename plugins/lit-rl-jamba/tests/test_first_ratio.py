"""With experts too the learner computes what the actor computed: PPO's ratio begins at 1."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lit_rl_jamba import experts
from lit_rl_jamba.jamba import Jamba

from lit_rl.algorithms import LitPPO
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig

torch.set_num_threads(1)

TINY = {"d_model": 16, "d_ff": 6, "d_state": 3, "n_heads": 2, "memory": 5}
ENV = EnvConfig("CartPole-v1", num_envs=4, mask_velocity=True, time_limit=11)  # resets inside every rollout


class Deviations(DummyLogger):
    """Keeps how far the first ratios of each rollout are from 1."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def log_metrics(self, metrics, step=None):
        if "train/first_ratio_deviation" in metrics:
            self.kept.append(metrics["train/first_ratio_deviation"])


def deviations(top_k: int) -> list[float]:
    torch.manual_seed(0)
    model = LitPPO(
        ENV,
        lambda in_features: Jamba(in_features, **TINY, pattern="1:1", experts=4, top_k=top_k, moe_every=1),
        total_frames=3 * ENV.num_envs * 32,
        num_epochs=1,
        num_minibatches=1,
        lr=1e-2,
        normalize_observation=True,
    )
    with torch.no_grad():
        for name, parameter in model.agent.policy.named_parameters():
            if name.endswith("weight"):
                parameter *= 100  # it starts near zero: actions then depend on what the trunk gives
    logger = Deviations()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=logger,
        max_epochs=-1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, RolloutDataModule(ENV, rollout_length=32, sequence_length=16))
    assert len(logger.kept) == 3
    return logger.kept


@pytest.mark.parametrize("top_k", [1, 2])
def test_first_ratio_is_one(top_k):
    assert max(deviations(top_k)) <= 1e-5


def test_experts_of_limited_capacity_are_caught(monkeypatch):
    """Experts that drop steps where many come at once, as in learning, drop none in acting."""
    mixture = experts.mixture

    def limited(x_ND, weight_Nk, expert_Nk, *weights):
        kept_N1 = torch.arange(len(x_ND))[:, None] < 100
        return mixture(x_ND, weight_Nk * kept_N1, expert_Nk, *weights)

    monkeypatch.setattr(experts, "mixture", limited)
    assert min(deviations(2)) > 1e-3
