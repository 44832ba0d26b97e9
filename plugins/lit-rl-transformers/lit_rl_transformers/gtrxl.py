"""The trunk `gtrxl`: Gated Transformer-XL (Parisotto et al. 2020, arXiv:1910.06764, section 3).

Two changes to Transformer-XL make it train under reinforcement learning. The norm moves to the input of each
submodule (identity map reordering), with a nonlinearity on its output, since two linear maps would follow one
another without it; and a gate like a GRU's takes the place of the residual sum:

    x <- g(x, gelu(Attention(LayerNorm(x)))),    x <- g(x, gelu(MLP(LayerNorm(x))))
    r = sigmoid(W_r y + U_r x),    z = sigmoid(W_z y + U_z x - b_g),    h = tanh(W_g y + U_g (r * x))
    g(x, y) = (1 - z) * x + z * h

A positive b_g keeps z small at the start: the trunk begins near the identity, so near a memoryless policy,
and learns to remember from there. Where the paper has ReLU this has GELU, for the reason given in
`lit_rl_transformers.transformer`. Cache and gradients are those of `lit_rl_transformers.transformer_xl`.

Shapes: B rows, Q time steps, D = d_model, ``...`` any dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from lit_rl.trunks import Linear
from lit_rl_transformers.positional_attention import RelativeAttention
from lit_rl_transformers.transformer import AttentionTrunk, Layer


class GRUGate(nn.Module):
    """g(x, y) of the paper; `bias` is b_g at the start, then learned, one a feature."""

    def __init__(self, d_model: int, bias: float) -> None:
        super().__init__()
        self.from_update = Linear(d_model, 3 * d_model, bias=False)  # W_r, W_z, W_g
        self.from_stream = Linear(d_model, 2 * d_model, bias=False)  # U_r, U_z
        self.from_reset_stream = Linear(d_model, d_model, bias=False)  # U_g
        self.bias = nn.Parameter(torch.full((d_model,), float(bias)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream ``[..., D]`` after the update ``y [..., D]``."""
        r_y, z_y, h_y = self.from_update(y).chunk(3, dim=-1)
        r_x, z_x = self.from_stream(x).chunk(2, dim=-1)
        h = torch.tanh(h_y + self.from_reset_stream(torch.sigmoid(r_y + r_x) * x))
        return torch.lerp(x, h.to(x.dtype), torch.sigmoid(z_y + z_x - self.bias).to(x.dtype))


class GatedLayer(Layer):
    """A layer whose attention and MLP join the stream through a gate each."""

    def __init__(self, attention: RelativeAttention, d_ff: int | None, gate_bias: float) -> None:
        super().__init__(attention, d_ff)
        self.attention_gate = GRUGate(attention.d_model, gate_bias)
        self.mlp_gate = GRUGate(attention.d_model, gate_bias)

    def join_attention(self, x_BQD: Tensor, update_BQD: Tensor) -> Tensor:
        return self.attention_gate(x_BQD, gelu(update_BQD))

    def join_mlp(self, x_BQD: Tensor, update_BQD: Tensor) -> Tensor:
        return self.mlp_gate(x_BQD, gelu(update_BQD))


class GTrXL(AttentionTrunk):
    """Gated Transformer-XL: each step sees itself and the `memory` steps before it, a layer; `d_ff` is the
    width of the MLPs, 4 d_model if None; `gate_bias` is b_g at the start."""

    def __init__(
        self,
        in_features: int,
        *,
        d_model: int = 128,
        n_layers: int = 2,
        n_heads: int = 4,
        memory: int = 64,
        d_ff: int | None = None,
        gate_bias: float = 2.0,
    ) -> None:
        if not math.isfinite(gate_bias):
            raise ValueError(f"gate_bias must be a finite number, not {gate_bias}")
        layers = [
            GatedLayer(RelativeAttention(d_model, n_heads=n_heads, memory=memory), d_ff, gate_bias)
            for _ in range(n_layers)
        ]
        super().__init__(in_features, layers, last=nn.Identity())
