"""Causal attention over a sliding window of steps, with a cache of keys and values.

    y_t = W_o concat_h sum_j w_tj v_j,    w_t = softmax_j(q_t . k_j / sqrt(C)),    t - memory <= j <= t

per head h of width C, over steps j of t's own episode (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).
`WindowAttention` knows no positions. It is a mixer: the residual, the norm and the MLP are its user's.

The cache holds projected keys and values, so that acting projects one step, not the whole memory. Gradients
flow through them, within a pass and into the state given, because one pass must equal T passes of one.

Shapes: B rows, T steps, Q of them with a query (all, or the last alone), D = d_model, M = memory, H heads,
C = D / H, E = 2 D (key, value); all rows have G blocks of S queries and W keys (see
`lit_rl_transformers.window`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lit_rl.trunks import Linear
from lit_rl_transformers.window import Window

# kv [B, M, E]: the last M steps, the latest last, zeros before the episode; age [B].
State = dict[str, Tensor]


def _exact(like: Tensor) -> torch.autocast:
    """Without autocast: rounded scores of one step are not those of the same step among many."""
    return torch.autocast(like.device.type, enabled=False)


class Heads(NamedTuple):
    """What the softmax is made of."""

    q_GHSC: Tensor
    k_GHWC: Tensor
    v_GHWC: Tensor
    bias: Tensor
    """Added to the scores, broadcastable to ``[G, H, S, W]``."""


class WindowAttention(nn.Module):
    """Each step attends to itself and the last `memory` steps before it in its episode; no positions."""

    def __init__(self, d_model: int, *, n_heads: int = 4, memory: int = 64) -> None:
        sizes = {"d_model": d_model, "n_heads": n_heads, "memory": memory}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if d_model % n_heads:
            raise ValueError(f"d_model = {d_model} does not split into n_heads = {n_heads} equal heads")
        super().__init__()
        self.d_model, self.n_heads, self.memory = d_model, n_heads, memory
        self.head_width = d_model // n_heads
        # No biases: a bias of the keys moves all scores of a query alike, which the softmax does not see.
        self.qkv = Linear(d_model, 3 * d_model, bias=False)
        self.out = Linear(d_model, d_model, bias=False)

    def initial_state(self, batch_size: int) -> State:
        """An empty cache: `kv` ``[B, M, E]`` and `age` ``[B]``, the steps of the episode so far (int64)."""
        weight = self.out.weight
        return {
            "kv": weight.new_zeros(batch_size, self.memory, 2 * self.d_model),
            "age": weight.new_zeros(batch_size, dtype=torch.int64),
        }

    def forward(self, x_BTD: Tensor, state: State, is_init_BT: Tensor) -> tuple[Tensor, State]:
        """One pass, ``[B, T, D]`` to ``[B, T, D]``, as the trunk contract has it."""
        window = self.window(state["age"], is_init_BT)
        y_BTD, slots = self.attend(x_BTD, state["kv"], window)
        return y_BTD, {"kv": window.cache_after(slots), "age": window.age_after_B}

    def attention_map(self, x_BTD: Tensor, state: State, is_init_BT: Tensor) -> Tensor:
        """Weights between the steps of a pass, ``[B, T, T]``: mean over heads, without those on the cache."""
        return self.weights(x_BTD, state["kv"], self.window(state["age"], is_init_BT))

    def window(self, age_B: Tensor, is_init_BT: Tensor, queries: int | None = None) -> Window:
        """What one pass of any number of such layers needs to know once; see `Window.of_pass`."""
        return Window.of_pass(age_B, is_init_BT, self.memory, self.out.weight.dtype, queries)

    def attend(self, x_BTD: Tensor, kv_BME: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Output of the steps with a query, ``[B, Q, D]``, and what `Window.cache_after` takes."""
        q_BQD, new_BTE = self._project(x_BTD, window)
        with _exact(kv_BME):
            heads, slots = self._heads(q_BQD, new_BTE, kv_BME, window)
            y_GHSC = scaled_dot_product_attention(*heads)
        return self.out(window.join(y_GHSC.transpose(1, 2).flatten(2))), slots

    def weights(self, x_BTD: Tensor, kv_BME: Tensor, window: Window) -> Tensor:
        """As `attention_map`, with a window at hand."""
        q_BTD, new_BTE = self._project(x_BTD, window)
        with _exact(kv_BME):
            (q_GHSC, k_GHWC, _, bias), _ = self._heads(q_BTD, new_BTE, kv_BME, window)
            scores_GHSW = q_GHSC @ k_GHWC.mT * q_GHSC.shape[-1] ** -0.5 + bias
        return window.square(scores_GHSW.softmax(dim=-1).mean(dim=1))

    def _heads(self, q_BQD: Tensor, new_BTE: Tensor, kv_BME: Tensor, window: Window) -> tuple[Heads, Tensor]:
        read_GWE, slots = window.slide(kv_BME, new_BTE.to(kv_BME.dtype))
        q_GSD = window.cut(q_BQD.to(kv_BME.dtype))
        G, S, _ = q_GSD.shape
        q_GHSC = q_GSD.view(G, S, self.n_heads, -1).transpose(1, 2)
        k_GHWC, v_GHWC = read_GWE.view(G, -1, 2, self.n_heads, self.head_width).permute(2, 0, 3, 1, 4)
        q_GHSC, bias = self._score(q_GHSC, window)
        return Heads(q_GHSC, k_GHWC, v_GHWC, bias), slots

    def _project(self, x_BTD: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Queries ``[B, Q, D]`` and new slots ``[B, T, E]`` of the cache."""
        q_BTD, new_BTE = self.qkv(x_BTD).split([self.d_model, 2 * self.d_model], dim=2)
        return window.asking(q_BTD), new_BTE

    def _score(self, q_GHSC: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """The queries, and what their scores gain beside the product with the keys."""
        return q_GHSC, window.align(window.bias_BNSd).flatten(0, 1)[:, None]
