"""Algorithms: LightningModules, one file each."""

from lit_rl.algorithms.dqn import LitDQN
from lit_rl.algorithms.ppo import LitPPO

__all__ = ["LitDQN", "LitPPO"]
