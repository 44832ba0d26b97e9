"""LSTM and GRU with exact resets inside sequences.

Both hold the torch module as `rnn`, so weights interchange with `nn.LSTM` and `nn.GRU`. Four ways lead to the
same numbers:

- T = 1: torch's cell;
- on the CPU, in float32 and float64: loops compiled by numba (`lit_rl.compiled`), on one core;
- LSTM there, without a reset inside the sequence: torch's kernel, as quick and on several cores;
- elsewhere: torch's kernel, on rows stretched by a step for each reset (`lit_rl.trunks.resets`).

Shapes: B rows, T time steps, K stretched steps, F input features, D = d_model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.compiled import can_be_compiled
from lit_rl.trunks.base import Trunk
from lit_rl.trunks.resets import SATURATE, StretchedRows

Weights = tuple[Tensor, ...]  # of G gates: weight_ih [G*D, F], weight_hh [G*D, D], bias_ih, bias_hh [G*D]
Memory = list[Tensor]  # one layer's memory, [B, D] each, h first
Layer = Callable[[Tensor, Memory, Weights], tuple[Tensor, Memory]]  # [B, T, F] to [B, T, D]


class Recurrent(Trunk):
    """What LSTM and GRU share: layers, state and the ways through a sequence.

    Weight matrices start orthogonal, biases at zero.
    """

    state_keys: ClassVar[tuple[str, ...]]
    has_quick_kernel: ClassVar[bool]  # torch has one for the CPU, without resets

    def __init__(self, in_features: int, rnn: nn.RNNBase) -> None:
        super().__init__(in_features, out_features=rnn.hidden_size)
        self.rnn = rnn
        self._shapes = dict.fromkeys(self.state_keys, (rnn.num_layers, rnn.hidden_size))
        for name, parameter in rnn.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)

    @abstractmethod
    def cell(self, x_BF: Tensor, memory: Memory, weights: Weights) -> Memory:
        """One step of one layer."""

    @abstractmethod
    def scan(self, x_BTF: Tensor, memory: Memory, weights: Weights) -> tuple[Tensor, Memory]:
        """All steps of one layer by torch's kernel, without resets."""

    @abstractmethod
    def compiled_scan(
        self, x_BTF: Tensor, memory: Memory, weights: Weights, *, is_init_BT: Tensor
    ) -> tuple[Tensor, Memory]:
        """All steps of one layer by compiled loops."""

    @abstractmethod
    def flag_weights(self, weights: Weights) -> Tensor:
        """Input weights ``[G*D, 2]`` of the reset flag and the padding flag.

        A reset makes the memory exactly zero. Padding keeps what `scan` returns of it; only h may change,
        because h is read at the last real step.
        """

    def initial_state(self, batch_size: int) -> TensorDict:
        zeros = next(self.parameters()).new_zeros
        state = {key: zeros(batch_size, *shape) for key, shape in self._shapes.items()}
        return TensorDict(state, batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        given = self.entries(x, state, is_init, self._shapes)
        # Outside autocast: a memory rounded to bfloat16 at every step would drift, and one pass would round
        # elsewhere than T passes of one, so that acting and learning disagreed.
        with torch.autocast(x.device.type, enabled=False):
            y = x.to(next(self.parameters()).dtype)
            entering = [given[key].to(y.dtype) for key in self.state_keys]
            entering = [memory.masked_fill(is_init[:, :1, None], 0) for memory in entering]
            y, leaving = self._layers(y, entering, is_init)
        memory = {key: m.to(given[key].dtype) for key, m in zip(self.state_keys, leaving, strict=True)}
        return y, TensorDict(memory, batch_size=state.batch_size, device=state.device)

    @torch.compiler.disable  # compiling would unroll the kernels over time: minutes, for something slower
    def _layers(self, y: Tensor, entering: list[Tensor], is_init: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All layers; `entering` and what leaves are the state's entries ``[B, n_layers, D]``."""
        rows, layer = self._way(y, entering, is_init)
        if rows is not None:
            y = rows.stretch(y)
        leaving: list[Memory] = []
        for index, weights in enumerate(self.rnn.all_weights):
            memory = [m[:, index].contiguous() for m in entering]  # as cuDNN wants it
            y, memory = layer(y, memory, tuple(weights))
            leaving.append(memory)
        if rows is not None:
            y = rows.real_steps(y)
        return y, [torch.stack(of_layers, dim=1) for of_layers in zip(*leaving, strict=True)]

    def _way(
        self, x_BTF: Tensor, entering: list[Tensor], is_init: Tensor
    ) -> tuple[StretchedRows | None, Layer]:
        """How a layer runs, and how rows are stretched for it if they are."""
        if is_init.shape[1] == 1:  # acting: the cell costs less than half of what is made for sequences
            return None, self._step
        has_inner_resets = bool(is_init[:, 1:].any())
        prefers_loops = has_inner_resets or not self.has_quick_kernel
        if prefers_loops and can_be_compiled(x_BTF, *entering, *self.parameters()):
            return None, partial(self.compiled_scan, is_init_BT=is_init)
        if not has_inner_resets:
            return None, self.scan
        rows = StretchedRows.around_resets(is_init, x_BTF.dtype)
        return rows, partial(self._scan_stretched, rows)

    def _step(self, x_BTF: Tensor, memory: Memory, weights: Weights) -> tuple[Tensor, Memory]:
        memory = self.cell(x_BTF[:, 0], memory, weights)
        return memory[0][:, None], memory

    def _scan_stretched(
        self, rows: StretchedRows, x_BKF: Tensor, memory: Memory, weights: Weights
    ) -> tuple[Tensor, Memory]:
        weight_ih, *others = weights
        weight_ih = torch.cat([weight_ih, self.flag_weights(weights)], dim=1)
        y_BKD, (_, *rest) = self.scan(rows.with_flags(x_BKF), memory, (weight_ih, *others))
        return y_BKD, [rows.last_real_step(y_BKD), *rest]


class LSTM(Recurrent):
    """`nn.LSTM`: gates i, f, g, o (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000)."""

    state_keys = ("h", "c")
    has_quick_kernel = True

    def __init__(self, in_features: int, *, d_model: int = 128, n_layers: int = 1) -> None:
        super().__init__(in_features, nn.LSTM(in_features, d_model, n_layers, batch_first=True))

    def cell(self, x_BF: Tensor, memory: Memory, weights: Weights) -> Memory:
        return list(torch.lstm_cell(x_BF, memory, *weights))

    def scan(self, x_BTF: Tensor, memory: Memory, weights: Weights) -> tuple[Tensor, Memory]:
        entering = [m[None] for m in memory]
        y, h, c = torch.lstm(x_BTF, entering, weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
        return y, [h[0], c[0]]

    def compiled_scan(
        self, x_BTF: Tensor, memory: Memory, weights: Weights, *, is_init_BT: Tensor
    ) -> tuple[Tensor, Memory]:
        from lit_rl.compiled.recurrent import compiled_lstm

        (h, c), (weight_ih, weight_hh, bias_ih, bias_hh) = memory, weights
        x_TBF, bias = x_BTF.transpose(0, 1), bias_ih + bias_hh
        y_TBD, h, c = compiled_lstm(x_TBF, h, c, weight_ih, weight_hh, bias, is_init_BT.t())
        return y_TBD.transpose(0, 1), [h, c]

    def flag_weights(self, weights: Weights) -> Tensor:
        D = self.out_features
        columns = weights[0].new_zeros(4 * D, 2)
        columns[: 2 * D, 0] = -SATURATE  # reset: i = f = 0, so c = 0 and h = o * tanh(0) = 0
        columns[:D, 1] = -SATURATE  # padding: i = 0
        columns[D : 2 * D, 1] = SATURATE  # and f = 1, so c stays as it is
        return columns


class GRU(Recurrent):
    """`nn.GRU`: gates r, z, n (Cho et al. 2014, with the reset gate after the matrix product as in cuDNN)."""

    state_keys = ("h",)
    has_quick_kernel = False

    def __init__(self, in_features: int, *, d_model: int = 128, n_layers: int = 1) -> None:
        super().__init__(in_features, nn.GRU(in_features, d_model, n_layers, batch_first=True))

    def cell(self, x_BF: Tensor, memory: Memory, weights: Weights) -> Memory:
        return [torch.gru_cell(x_BF, memory[0], *weights)]

    def scan(self, x_BTF: Tensor, memory: Memory, weights: Weights) -> tuple[Tensor, Memory]:
        y, h = torch.gru(x_BTF, memory[0][None], weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
        return y, [h[0]]

    def compiled_scan(
        self, x_BTF: Tensor, memory: Memory, weights: Weights, *, is_init_BT: Tensor
    ) -> tuple[Tensor, Memory]:
        from lit_rl.compiled.recurrent import compiled_gru

        (h,), (weight_ih, weight_hh, bias_ih, bias_hh) = memory, weights
        x_TBF = x_BTF.transpose(0, 1)
        y_TBD, h = compiled_gru(x_TBF, h, weight_ih, weight_hh, bias_ih, bias_hh, is_init_BT.t())
        return y_TBD.transpose(0, 1), [h]

    def flag_weights(self, weights: Weights) -> Tensor:
        D = self.out_features
        _, _, bias_ih, _ = weights
        shut = bias_ih.new_full((2 * D,), -SATURATE)
        reset = torch.cat([shut, -bias_ih[2 * D :]])  # r = z = 0 and n = tanh(0), so h = 0
        return torch.stack([reset, torch.zeros_like(reset)], dim=1)  # padding: any h will do, none is read
