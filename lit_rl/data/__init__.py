"""LightningDataModules: where batches come from. `rollout` is on-policy, `replay` off-policy."""

from lit_rl.data.base import EnvDataModule
from lit_rl.data.replay import ReplayDataModule
from lit_rl.data.rollout import RolloutDataModule

__all__ = ["EnvDataModule", "ReplayDataModule", "RolloutDataModule"]
