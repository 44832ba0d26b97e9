"""Trunks: the contract and the built-in architectures `mlp`, `lstm` and `gru`."""

from lit_rl.trunks.base import Trunk

__all__ = ["Trunk"]
