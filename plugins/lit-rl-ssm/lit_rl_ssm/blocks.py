"""The residual stack that Mamba and Mamba-2 stand in, and the interface of what it stacks.

    u   = embedding(x)
    u  <- u + mixer_l(norm_l(u))        for l = 0 .. n_layers-1
    y   = norm_f(u)

Pre-norm, with RMSNorm and a last norm as in the models of Gu & Dao 2023 (arXiv:2312.00752) and Dao & Gu 2024
(arXiv:2405.21060); their `layers.*.norm`, `layers.*.mixer` and `norm_f` have these names here. The embedding
of tokens is a linear map of the features.

Shapes: B rows, T time steps, F input features, D = d_model, M heads of a mixer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.trunks import Linear, Trunk
from lit_rl_ssm.norm import RMSNorm

# On the CPU a long sequence runs in pieces whose tensors ``[B, T, channels]`` have at most about this many
# numbers: larger ones are mapped into memory anew for every operation, which costs time of its own.
PIECE = 2**20


def strict(is_init_BT: Tensor) -> Tensor:
    """Resets where they are."""
    return is_init_BT


def leaky(is_init_BT: Tensor) -> Tensor:
    """None: episodes run into one another, as in code that trains and acts on a memory that no one clears.

    A common mistake kept as an option, for comparison.
    """
    return torch.zeros_like(is_init_BT)


RESETS: dict[str, Callable[[Tensor], Tensor]] = {"strict": strict, "leaky": leaky}


def resets_by(reset: str) -> Callable[[Tensor], Tensor]:
    """What becomes of `is_init`; raises ValueError for a word that `RESETS` does not know."""
    if reset not in RESETS:
        raise ValueError(f"reset must be one of {', '.join(RESETS)}, not {reset!r}")
    return RESETS[reset]


def require_sizes(**sizes: int) -> None:
    """Raise ValueError unless each number is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")


class Mixer(nn.Module, ABC):
    """A layer over time of width `d_model`; norm, residual and MLP stand around it.

    It keeps the equality that a trunk keeps, resets included.

    Args:
        d_model: D.
        channels: numbers a step in its largest tensors.
    """

    def __init__(self, d_model: int, channels: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.channels = channels

    @abstractmethod
    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """Zeros ``[B, ...]`` on the device and in the dtype of the parameters."""

    @abstractmethod
    def piece(
        self,
        x_BTD: Tensor,
        state: dict[str, Tensor],
        is_init_BT: Tensor,
        wanted: slice = slice(None),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The outputs of the `wanted` steps, and the state after all of them, at once."""

    @abstractmethod
    def hidden_attention(self, x_BTD: Tensor, state: dict[str, Tensor], is_init_BT: Tensor) -> Tensor:
        """``[B, M, T, T]``, what step s (column) of each head's input adds to its output at step t (row).

        Ali et al. 2024 (arXiv:2403.01590). The skip past the memory and what the given state adds are left
        out; the state still reaches the map through the convolution.
        """

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor], is_init_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``y [B, T, D]`` and the state after the last step; on the CPU by pieces of `PIECE` numbers."""
        at_once = self._steps_at_once(x_BTD)
        if x_BTD.shape[1] <= at_once:
            return self.piece(x_BTD, state, is_init_BT)
        outputs = []
        for x_BtD, is_init_Bt in zip(x_BTD.split(at_once, 1), is_init_BT.split(at_once, 1), strict=True):
            y_BtD, state = self.piece(x_BtD, state, is_init_Bt)
            outputs.append(y_BtD)
        return torch.cat(outputs, dim=1), state

    def last_steps(self, x_BTD: Tensor, state: dict[str, Tensor], is_init_BT: Tensor, steps: int) -> Tensor:
        """``y [B, steps, D]`` of the last steps alone, see `Trunk.last_steps`."""
        if x_BTD.shape[1] > self._steps_at_once(x_BTD):
            return self(x_BTD, state, is_init_BT)[0][:, -steps:]
        return self.piece(x_BTD, state, is_init_BT, slice(-steps, None))[0]

    def attention_map(self, x_BTD: Tensor, state: dict[str, Tensor], is_init_BT: Tensor) -> Tensor:
        """``[B, T, T]``, one map for a picture: `mean_size` of the hidden attention."""
        return mean_size(self.hidden_attention(x_BTD, state, is_init_BT))

    def _steps_at_once(self, x_BTD: Tensor) -> int:
        rows, steps, _ = x_BTD.shape
        return max(1, PIECE // (rows * self.channels)) if x_BTD.is_cpu else steps


def mean_size(heads_BMTT: Tensor) -> Tensor:
    """``[B, T, T]``, the mean over heads of how large their entries are."""
    return heads_BMTT.abs().mean(dim=1)


class Block(nn.Module):
    """``u + mixer(norm(u))``."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.norm = RMSNorm(mixer.d_model)
        self.mixer = mixer

    def forward(
        self, u_BTD: Tensor, memory: dict[str, Tensor], is_init_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y_BTD, memory = self.mixer(self.norm(u_BTD), memory, is_init_BT)
        return u_BTD + y_BTD, memory

    def last_steps(self, u_BTD: Tensor, memory: dict[str, Tensor], is_init_BT: Tensor, steps: int) -> Tensor:
        """``[B, steps, D]``, what `forward` gives of the last steps."""
        return u_BTD[:, -steps:] + self.mixer.last_steps(self.norm(u_BTD), memory, is_init_BT, steps)


class ResidualTrunk(Trunk):
    """Mixers of one kind and size, each in a pre-norm residual block.

    Args:
        in_features: F.
        make_mixer: called once a layer; the states must be of one shape.
        n_layers: how many.
        reset: a key of `RESETS`.

    State: each entry of the mixers' states, stacked over layers, ``[B, n_layers, ...]``.
    """

    def __init__(
        self, in_features: int, make_mixer: Callable[[], Mixer], *, n_layers: int, reset: str
    ) -> None:
        require_sizes(in_features=in_features, n_layers=n_layers)
        resets = resets_by(reset)
        mixers = [make_mixer() for _ in range(n_layers)]
        d_model = mixers[0].d_model
        super().__init__(in_features, out_features=d_model)
        self.resets = resets
        self.embedding = Linear(in_features, d_model)
        self.layers = nn.ModuleList(Block(mixer) for mixer in mixers)
        self.norm_f = RMSNorm(d_model)
        of_one_row = mixers[0].initial_state(1)
        self._state_shapes = {key: (n_layers, *leaf.shape[1:]) for key, leaf in of_one_row.items()}

    def initial_state(self, batch_size: int) -> TensorDict:
        memories = [block.mixer.initial_state(batch_size) for block in self.layers]
        leaves = {key: _stack([memory[key] for memory in memories]) for key in self._state_shapes}
        return TensorDict(leaves, batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        is_init_BT = self.resets(is_init)
        u_BTD, memories = self._embed(x), self._memories(x, state, is_init)
        leaving = []
        for block, memory in zip(self.layers, memories, strict=True):
            u_BTD, memory = block(u_BTD, memory, is_init_BT)
            leaving.append(memory)
        leaves = {key: _stack([memory[key] for memory in leaving]) for key in self._state_shapes}
        return self.norm_f(u_BTD), TensorDict(leaves, batch_size=state.batch_size)

    def last_steps(self, x: Tensor, state: TensorDict, is_init: Tensor, steps: int) -> Tensor:
        """See `Trunk`; the last layer's gate and output projection run over these steps only."""
        is_init_BT = self.resets(is_init)
        u_BTD, memories = self._embed(x), self._memories(x, state, is_init)
        *lower, last = zip(self.layers, memories, strict=True)
        for block, memory in lower:
            u_BTD, _ = block(u_BTD, memory, is_init_BT)
        block, memory = last
        return self.norm_f(block.last_steps(u_BTD, memory, is_init_BT, steps))

    def hidden_attention(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Tensor]:
        """For each layer ``[B, M, T, T]``, see `Mixer.hidden_attention`."""
        is_init_BT = self.resets(is_init)
        u_BTD, maps = self._embed(x), []
        for block, memory in zip(self.layers, self._memories(x, state, is_init), strict=True):
            maps.append(block.mixer.hidden_attention(block.norm(u_BTD), memory, is_init_BT))
            u_BTD, _ = block(u_BTD, memory, is_init_BT)
        return maps

    def attention_maps(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Tensor]:
        """For each layer ``[B, T, T]``: the mean of the hidden attention's sizes over heads."""
        return [mean_size(heads_BMTT) for heads_BMTT in self.hidden_attention(x, state, is_init)]

    def _embed(self, x_BTF: Tensor) -> Tensor:
        # The residual sum keeps the parameters' precision under autocast.
        return self.embedding(x_BTF).to(self.norm_f.weight.dtype)

    def _memories(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[dict[str, Tensor]]:
        """Each layer's part of the state."""
        leaves = self.entries(x, state, is_init, self._state_shapes)
        return [{key: leaf[:, layer] for key, leaf in leaves.items()} for layer in range(len(self.layers))]


def _stack(of_layers: list[Tensor]) -> Tensor:
    """``[B, ...]`` of each layer to ``[B, n_layers, ...]``; of one layer a view."""
    return of_layers[0][:, None] if len(of_layers) == 1 else torch.stack(of_layers, dim=1)
