"""Trunks: the contract and the built-in architectures `mlp`, `lstm` and `gru`."""

from lit_rl.linear_maps import Linear, linear
from lit_rl.trunks.base import Trunk
from lit_rl.trunks.mlp import MLP
from lit_rl.trunks.recurrent import GRU, LSTM

__all__ = ["GRU", "LSTM", "MLP", "Linear", "Trunk", "linear"]
