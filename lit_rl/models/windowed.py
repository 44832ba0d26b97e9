"""A trunk that sees only its last few inputs: what a replayed window sees, while acting.

Shapes: B rows, T steps, W steps of the window, F features, D latent.
"""

from __future__ import annotations

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
        parameter = next(self._trunk[0].parameters())
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
        B, T, F = x.shape
        W, trunk = self.window, self._trunk[0]
        features = torch.cat([state[FEATURES], x.to(state[FEATURES].dtype)], 1)  # [B, W - 1 + T, F]
        starts = pad(state[STARTS], (0, T - 1))  # [B, W - 1 + T]
        starts[:, W - 1 :] |= is_init
        if T == 1:
            windows, is_init_in_windows = features, starts
        else:
            windows = features.unfold(1, W, 1).transpose(2, 3).reshape(B * T, W, F)
            is_init_in_windows = starts.unfold(1, W, 1).reshape(B * T, W)
        y, _ = trunk(windows, trunk.initial_state(B * T), is_init_in_windows)
        past = {FEATURES: features[:, T:], STARTS: pad(starts[:, T:], (0, 1))}
        return y[:, -1].view(B, T, -1), TensorDict(past, batch_size=state.batch_size, device=state.device)
