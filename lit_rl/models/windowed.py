"""A trunk that sees only its last few inputs: what a replayed window sees, while acting.

Shapes: B rows, T steps, W steps of the window, F features, D latent.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from lit_rl.trunks import Trunk

FEATURES = "features"  # [B, W - 1, F]
STARTS = "starts"  # bool [B, W]: where an episode begins, at these inputs and at the one to come


class Windowed(Trunk):
    """`trunk` over a sliding window: each output comes of the last W inputs and an empty memory.

    It costs a pass over W steps a step, and is for agents that learn from windows with an empty memory at
    their start: acting with memory carried along would show the trunk lengths that it was not trained on.
    The trunk stays its owner's: this module has no parameters of its own.

    Args:
        trunk: what is applied.
        in_features: F.
        window: W.
    """

    def __init__(self, trunk: Trunk, in_features: int, window: int) -> None:
        super().__init__(in_features, trunk.out_features)
        self._trunk = [trunk]  # in a list: it is not registered twice
        self.window = window

    def initial_state(self, batch_size: int) -> TensorDict:
        parameter = next(self._trunk[0].parameters(), torch.empty(0))
        past = self.window - 1
        return TensorDict(
            {
                FEATURES: parameter.new_zeros(batch_size, past, self.in_features),
                # Every empty place begins an episode of its own, and the first input another: no trace.
                STARTS: torch.ones(batch_size, past + 1, dtype=torch.bool, device=parameter.device),
            },
            batch_size=[batch_size],
        )

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        B, T, _ = x.shape
        features, starts = self._with_past(x, state, is_init)
        y = self._trunk[0].last_steps(*self._windows(features, starts), 1)
        past = {FEATURES: features[:, T:], STARTS: pad(starts[:, T:], (0, 1))}
        return y.view(B, T, -1), TensorDict(past, batch_size=state.batch_size, device=state.device)

    def attention_maps(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Tensor]:
        """``[B, T, T]`` a layer of a trunk that has such maps: what each step takes of those in its window.

        What it takes of steps before the first is left out.
        """
        (B, T, _), W = x.shape, self.window
        trunk: Any = self._trunk[0]
        maps = trunk.attention_maps(*self._windows(*self._with_past(x, state, is_init)))
        step = torch.arange(T, device=x.device)[:, None] + torch.arange(W, device=x.device)  # W - 1 too late
        rows = [attention[:, -1].view(B, T, W) for attention in maps]
        with_past = [row.new_zeros(B, T, W - 1 + T).scatter(2, step.expand(B, T, W), row) for row in rows]
        return [attention[..., W - 1 :] for attention in with_past]

    def _with_past(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, W - 1 + T, F]`` and where episodes begin among them."""
        features = torch.cat([state[FEATURES], x.to(state[FEATURES].dtype)], 1)
        starts = pad(state[STARTS], (0, x.shape[1] - 1))
        starts[:, self.window - 1 :] |= is_init
        return features, starts

    def _windows(self, features: Tensor, starts: Tensor) -> tuple[Tensor, TensorDict, Tensor]:
        """What the trunk is given: ``[B T, W, F]``, one window a step, from an empty memory."""
        W = self.window
        if features.shape[1] > W:
            features = features.unfold(1, W, 1).transpose(2, 3).flatten(0, 1)
            starts = starts.unfold(1, W, 1).flatten(0, 1)
        return features, self._trunk[0].initial_state(len(features)), starts
