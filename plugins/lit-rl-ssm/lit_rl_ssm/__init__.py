"""Mamba, Mamba-2 and simple state-space models as trunks for lit_rl."""
