"""LightningDataModules: where batches come from. `rollout` is on-policy."""

from lit_rl.data.rollout import RolloutDataModule

__all__ = ["RolloutDataModule"]
