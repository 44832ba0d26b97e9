"""Causal Transformer, Transformer-XL and GTrXL as trunks for lit_rl, and their attention as layers."""
