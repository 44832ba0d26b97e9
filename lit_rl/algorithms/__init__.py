"""Algorithms: one LightningModule a file."""

from lit_rl.algorithms.ppo import LitPPO

__all__ = ["LitPPO"]
