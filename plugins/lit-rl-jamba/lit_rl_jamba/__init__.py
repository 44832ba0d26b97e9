"""Jamba as a trunk for lit_rl: Mamba and attention layers in any order, and mixtures of experts."""
