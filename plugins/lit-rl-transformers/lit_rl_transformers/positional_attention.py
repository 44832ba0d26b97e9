"""Attention over a sliding window that knows how far back a step lies, in two ways.

`RotaryAttention` turns queries and keys by their position in the episode (Su et al. 2021, arXiv:2104.09864).
`RelativeAttention` scores as Transformer-XL does (Dai et al. 2019, arXiv:1901.02860, section 3.3):

    score_ij = (q_i + u) . k_j / sqrt(C) + (q_i + v) . W_kr R_{i-j} / sqrt(C)

with learned u and v a head, a learned matrix W_kr and sinusoids R. Here they belong to each layer.

Both keep the cache of `WindowAttention`: keys turned once stay right, because only differences of positions
matter; keys of Transformer-XL know no position at all.

Shapes: as in `lit_rl_transformers.attention`, and d the M + 1 distances from M down to 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lit_rl.trunks import Linear
from lit_rl_transformers.attention import WindowAttention
from lit_rl_transformers.positions import rotate, rotation, signed_frequencies, sinusoids
from lit_rl_transformers.window import Window


class RotaryAttention(WindowAttention):
    """`WindowAttention` with rotary positions."""

    def __init__(self, d_model: int, *, n_heads: int = 4, memory: int = 64) -> None:
        super().__init__(d_model, n_heads=n_heads, memory=memory)
        if d_model // n_heads % 2:
            raise ValueError(
                f"heads of odd width ({d_model} / {n_heads} = {d_model // n_heads}) have no pairs to rotate: "
                "change d_model or n_heads"
            )
        # A list: a buffer would be rounded to float32 with the parameters.
        self.frequencies = signed_frequencies(self.head_width)

    def window(self, age_B: Tensor, is_init_BT: Tensor, queries: int | None = None) -> Window:
        window = super().window(age_B, is_init_BT, queries)
        return replace(window, rotation=rotation(window.age_BT, self.frequencies, self.out.weight.dtype))

    def _project(self, x_BTD: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        assert window.rotation is not None
        qk, v_BTD = self.qkv(x_BTD).split([2 * self.d_model, self.d_model], dim=2)
        turned = rotate(qk.view(*qk.shape[:2], -1, self.head_width), window.rotation).flatten(2)
        q_BTD, k_BTD = turned.chunk(2, dim=2)
        return window.asking(q_BTD), torch.cat([k_BTD, v_BTD], dim=2)


class RelativeAttention(WindowAttention):
    """`WindowAttention` with the relative positions of Transformer-XL."""

    distances: Tensor

    def __init__(self, d_model: int, *, n_heads: int = 4, memory: int = 64) -> None:
        super().__init__(d_model, n_heads=n_heads, memory=memory)
        self.position = Linear(d_model, d_model, bias=False)  # W_kr
        self.content_bias = nn.Parameter(torch.zeros(n_heads, 1, self.head_width))  # u
        self.position_bias = nn.Parameter(torch.zeros(n_heads, 1, self.head_width))  # v
        table_dD = sinusoids(torch.arange(memory, -1, -1), d_model) * self.head_width**-0.5
        self.register_buffer("distances", table_dD.to(self.out.weight), persistent=False)  # R / sqrt(C)

    def _score(self, q_GHSC: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        G, H, S, C = q_GHSC.shape
        r_HCd = self.position(self.distances).view(-1, H, C).permute(1, 2, 0)
        # One product a head over all blocks: the table of positions is the same for all.
        q_HGSC = (q_GHSC + self.position_bias).transpose(0, 1).reshape(H, G * S, C)
        hidden = window.bias_BNSd.view(1, G * S, -1)
        bias_HGSd = torch.baddbmm(hidden, q_HGSC, r_HCd).view(H, G, S, -1)
        return q_GHSC + self.content_bias, window.align(bias_HGSd).transpose(0, 1)
