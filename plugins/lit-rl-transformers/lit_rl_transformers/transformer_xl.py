"""The trunk `transformer_xl`: Transformer-XL (Dai, Yang, Yang, Carbonell, Le & Salakhutdinov 2019,
arXiv:1901.02860).

Each layer sees the last `memory` steps through a cache, with relative positions (section 3.3), so that what
reaches a step goes back n_layers * memory steps. Three things differ from the paper:

- The memory slides with every step; there, with every segment. A step's window, and with it the output, then
  does not depend on where a sequence is cut into passes.
- The cache holds keys and values, there hidden states, so that acting does not project the memory anew.
  Within a segment the two give the same numbers; keys and values stored before an update of the weights are
  those of the old weights, where the paper's would be old hidden states under new weights.
- Gradients flow through the cache inside a pass; there they stop at the segment. Again because one pass must
  equal any chunks of it. What a rollout stores is detached, so they stop where the sequence starts.

The norms come first, as in `lit_rl_transformers.transformer`; the paper's come last.
"""

from __future__ import annotations

from torch import nn

from lit_rl_transformers.positional_attention import RelativeAttention
from lit_rl_transformers.transformer import AttentionTrunk, Layer


class TransformerXL(AttentionTrunk):
    """Transformer-XL: each step sees itself and the `memory` steps before it, a layer; `d_ff` is the width of
    the MLPs, 4 d_model if None."""

    def __init__(
        self,
        in_features: int,
        *,
        d_model: int = 128,
        n_layers: int = 2,
        n_heads: int = 4,
        memory: int = 64,
        d_ff: int | None = None,
    ) -> None:
        layers = [
            Layer(RelativeAttention(d_model, n_heads=n_heads, memory=memory), d_ff) for _ in range(n_layers)
        ]
        super().__init__(in_features, layers, last=nn.LayerNorm(d_model))
