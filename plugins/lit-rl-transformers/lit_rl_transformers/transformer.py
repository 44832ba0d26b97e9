"""The trunk `transformer`: a causal Transformer over a sliding window, and what all trunks here share.

    x <- x + Attention(LayerNorm(x)),    x <- x + W_2 gelu(W_1 LayerNorm(x))        a layer

(Vaswani et al. 2017, arXiv:1706.03762, with the norms first: Xiong et al. 2020, arXiv:2002.04745.) Rotary
positions, not sinusoids added to the features: attention then depends on distances, all of which a few steps
show, whereas the time since the start of an episode goes on to numbers that training never saw.

GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) because it is smooth: at the kink of a ReLU, rounding decides
between two gradients, and one pass would now and then disagree with T passes of one.

No dropout anywhere: acting and learning must be the same function, or the PPO ratio does not begin at 1.

Shapes: B rows, T time steps, Q of them with a query (all, or the last alone), D = d_model, M = memory,
E = 2 D (key, value).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.trunks import Linear, Trunk
from lit_rl_transformers.attention import WindowAttention
from lit_rl_transformers.positional_attention import RotaryAttention
from lit_rl_transformers.window import Window


class Layer(nn.Module):
    """One layer: an attention and an MLP, and how they join the stream ``[B, T, D]``."""

    def __init__(self, attention: WindowAttention, d_ff: int | None) -> None:
        super().__init__()
        d_model = attention.d_model
        d_ff = 4 * d_model if d_ff is None else d_ff
        if d_ff < 1:
            raise ValueError(f"d_ff must be at least 1, not {d_ff}")
        self.attention = attention
        self.attention_norm = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(Linear(d_model, d_ff), nn.GELU(), Linear(d_ff, d_model))
        self.mlp_norm = nn.LayerNorm(d_model)

    def forward(self, x_BTD: Tensor, kv_BME: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """The stream after this layer, ``[B, Q, D]``, and what `Window.cache_after` takes."""
        attended_BQD, slots = self.attention.attend(self.attention_norm(x_BTD), kv_BME, window)
        x_BQD = self.join_attention(window.asking(x_BTD), attended_BQD)
        return self.join_mlp(x_BQD, self.mlp(self.mlp_norm(x_BQD))), slots

    def join_attention(self, x_BQD: Tensor, update_BQD: Tensor) -> Tensor:
        """The stream after the attention."""
        return x_BQD + update_BQD

    def join_mlp(self, x_BQD: Tensor, update_BQD: Tensor) -> Tensor:
        """The stream after the MLP."""
        return x_BQD + update_BQD


class AttentionTrunk(Trunk):
    """Features -> `d_model` -> layers -> output; the state is one cache of keys and values a layer.

    State: for each layer l `kv_l` ``[B, M, E]``, the last M steps, the latest last, zeros before the episode;
    and `age` ``[B]``, the steps of the episode so far (int64). A tensor a layer, not one stacked over layers:
    acting then moves every cache once a step, and stacking would move all of it again.
    """

    def __init__(self, in_features: int, layers: Sequence[Layer], last: nn.Module) -> None:
        if not layers:
            raise ValueError("n_layers must be at least 1")
        attention = layers[0].attention
        super().__init__(in_features, out_features=attention.d_model)
        self.embed = Linear(in_features, attention.d_model)
        self.layers = nn.ModuleList(layers)
        self.last = last
        self.cache_keys = tuple(f"kv_{number}" for number in range(len(layers)))
        cache_shape = (attention.memory, 2 * attention.d_model)
        self._state_shapes = dict.fromkeys(self.cache_keys, cache_shape) | {"age": ()}

    def initial_state(self, batch_size: int) -> TensorDict:
        zeros = self.embed.weight.new_zeros
        empty = {key: zeros(batch_size, *shape) for key, shape in self._state_shapes.items()}
        empty["age"] = empty["age"].long()
        return TensorDict(empty, batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        x_BTD, caches = self._enter(x, state, is_init)
        window = self._window(caches["age"], is_init)
        after = {"age": window.age_after_B}
        for key, layer in self._stack():
            x_BTD, slots = layer(x_BTD, caches[key], window)
            after[key] = window.cache_after(slots)
        return self.last(x_BTD), TensorDict(after, batch_size=state.batch_size, device=state.device)

    def attention_maps(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Tensor]:
        """Weights between the steps of the pass, ``[B, T, T]`` a layer: mean over heads, cache left out."""
        x_BTD, caches = self._enter(x, state, is_init)
        window, maps = self._window(caches["age"], is_init), []
        for key, layer in self._stack():
            maps.append(layer.attention.weights(layer.attention_norm(x_BTD), caches[key], window))
            x_BTD, _ = layer(x_BTD, caches[key], window)
        return maps

    def last_steps(self, x: Tensor, state: TensorDict, is_init: Tensor, steps: int) -> Tensor:
        """See `Trunk`; of the steps before these, the last layer computes their keys and values at most."""
        if steps == x.shape[1]:
            return super().last_steps(x, state, is_init, steps)
        x_BTD, caches = self._enter(x, state, is_init)
        *lower, (last_key, last) = self._stack()
        if lower:
            window = self._window(caches["age"], is_init)
            for key, layer in lower:
                x_BTD, _ = layer(x_BTD, caches[key], window)
        x_BQD, _ = last(x_BTD, caches[last_key], self._window(caches["age"], is_init, steps))
        return self.last(x_BQD)

    def _window(self, age_B: Tensor, is_init_BT: Tensor, queries: int | None = None) -> Window:
        _, first = next(self._stack())
        return first.attention.window(age_B, is_init_BT, queries)

    def _enter(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        entries = self.entries(x, state, is_init, self._state_shapes)
        # Under autocast products are rounded; the stream, to which every layer adds, keeps its own precision.
        return self.embed(x).to(self.embed.weight.dtype), entries

    def _stack(self) -> Iterator[tuple[str, Layer]]:
        return zip(self.cache_keys, cast(Iterable[Layer], self.layers), strict=True)


class Transformer(AttentionTrunk):
    """A causal Transformer: each step sees itself and the `memory` steps before it, a layer; `d_ff` is the
    width of the MLPs, 4 d_model if None."""

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
            Layer(RotaryAttention(d_model, n_heads=n_heads, memory=memory), d_ff) for _ in range(n_layers)
        ]
        super().__init__(in_features, layers, last=nn.LayerNorm(d_model))
