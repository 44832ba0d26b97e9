"""The window of a pass: which steps each query sees and where they lie, worked out once for all layers.

Query t sees the step at distance d before it where ``0 <= d <= min(memory, age_t)``; age_t is how many steps
of its episode came before it, in this pass or in former ones. So one number a query tells its whole mask, and
one number a row tells which slots of the cache hold steps of the present episode: the last min(memory, age).

The Q queries, of all T steps or of the last alone, are cut into N blocks of S. The keys of a block are its
own S steps and the M before them, so time and memory are linear in Q: no Q x (M + Q) matrix of mostly hidden
scores. One gather lays the blocks out from the cache, the new steps and a row of zeros, which stands for
every slot that holds nothing. Whatever a cache has in such slots, even NaN, is therefore never read, and is
zero in the cache after the pass.

Shapes: B rows, T steps, Q of them with a query, M = memory, P = M + Q slots of a row that may be seen, N
blocks, S queries a block, W = M + S keys a block, d the M + 1 distances from M down to 0, D features, E
numbers a slot, G = B * N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# Added to the scores of hidden keys: exp(-1e30 - max) is exactly 0, and unlike -inf it cannot make NaN.
# Float32's lowest number would become -inf where autocast rounds it to bfloat16.
HIDDEN = -1e30
SHORTEST_BLOCK = 16  # blocks of fewer queries cost more to lay out than they save


def episode_ages(age_B: Tensor, is_init_BT: Tensor) -> Tensor:
    """Steps of the episode before each step of a pass, ``[B, T]``, where `age_B` stand before the pass."""
    if is_init_BT.shape[1] == 1:
        return age_B[:, None].masked_fill(is_init_BT, 0)
    step_T = torch.arange(is_init_BT.shape[1], device=is_init_BT.device)
    # An episode that began before the pass began at step -age of it.
    return step_T - torch.where(is_init_BT, step_T, -age_B[:, None]).cummax(dim=1).values


@dataclass(frozen=True)
class Window:
    """Blocks, visibility and cache slots of one pass over T steps."""

    memory: int
    queries: int
    blocks: int
    block_steps: int
    age_BT: Tensor
    """Steps of the episode before each step, int64."""
    bias_BNSd: Tensor
    """0 where the step at that distance is visible, else `HIDDEN`."""
    read: Tensor
    """Slots of the blocks' keys, ``[B*N*W]``."""
    keep: Tensor | None
    """Slots of the next cache, ``[B*M]``; None after one step, where they are the last M read."""
    rotation: tuple[Tensor, Tensor] | None = None
    """Cosine and sine of each step's angles, ``[B, T, 1, C]``, where the attention turns by position."""

    @classmethod
    def of_pass(
        cls, age_B: Tensor, is_init_BT: Tensor, memory: int, dtype: torch.dtype, queries: int | None = None
    ) -> Window:
        """The window of a pass that `age_B` steps of each row's episode precede; scores have `dtype`.

        The last `queries` steps have a query, all if None.
        """
        (B, T), device = is_init_BT.shape, is_init_BT.device
        queries = T if queries is None else queries
        early = T - queries
        blocks = -(-queries // max(memory, SHORTEST_BLOCK))
        block_steps = -(-queries // blocks)
        missing = blocks * block_steps - queries

        age_BT = episode_ages(age_B, is_init_BT)
        age_BNS1 = _pad_end(age_BT[:, early:], missing).reshape(B, blocks, block_steps, 1)
        hidden_BNSd = torch.arange(memory, -1, -1, device=device) > age_BNS1
        bias_BNSd = torch.zeros(hidden_BNSd.shape, dtype=dtype, device=device).masked_fill_(
            hidden_BNSd, HIDDEN
        )

        # As `slide` joins them: one of zeros, then P. Slot 0 stands for all that hold nothing.
        slot_BP = torch.arange(B * (1 + memory + queries), device=device).view(B, -1)[:, 1:]
        back_P = torch.arange(memory - early, -T, -1, device=device)  # steps from each to the first new one
        from_entry_BP = slot_BP.masked_fill(back_P > age_BT[:, :1], 0)
        read = _pad_end(from_entry_BP, missing).unfold(1, memory + block_steps, block_steps).flatten()
        keep = None
        if T > 1:
            from_end_BP = slot_BP.masked_fill(back_P + (T - 1) > age_BT[:, -1:], 0)
            keep = from_end_BP[:, queries:].flatten()
        return cls(memory, queries, blocks, block_steps, age_BT, bias_BNSd, read, keep)

    @property
    def age_after_B(self) -> Tensor:
        """Steps of the episode before the first step after the pass."""
        return self.age_BT[:, -1] + 1

    @property
    def early(self) -> int:
        """Steps before those with a query."""
        return self.age_BT.shape[1] - self.queries

    def asking(self, x_BT: Tensor) -> Tensor:
        """Of ``[B, T, ...]`` the steps with a query, ``[B, Q, ...]``."""
        return x_BT[:, self.early :] if self.early else x_BT

    def slide(self, cache_BME: Tensor, new_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks read, ``[B*N, W, E]``, and what `cache_after` makes the next cache of."""
        B, _, E = new_BTE.shape
        if self.early:
            cache_BME, new_BTE = cache_BME[:, self.early :], new_BTE[:, max(self.early - self.memory, 0) :]
        slots = torch.cat([new_BTE.new_zeros(B, 1, E), cache_BME, new_BTE], dim=1).view(-1, E)
        read_GWE = slots.index_select(0, self.read).view(-1, self.memory + self.block_steps, E)
        return read_GWE, read_GWE if self.keep is None else slots

    def cache_after(self, slots: Tensor) -> Tensor:
        """The cache after the pass, ``[B, M, E]``."""
        if self.keep is None:
            return slots[:, 1:]
        return slots.index_select(0, self.keep).view(-1, self.memory, slots.shape[1])

    def cut(self, x_BQD: Tensor) -> Tensor:
        """``[B, Q, D]`` to blocks ``[B*N, S, D]``, zeros after the last step."""
        missing = self.blocks * self.block_steps - self.queries
        x_BQD = pad(x_BQD, (0, 0, 0, missing)) if missing else x_BQD
        return x_BQD.reshape(-1, self.block_steps, x_BQD.shape[2])

    def join(self, x_GSD: Tensor) -> Tensor:
        """Blocks ``[B*N, S, D]`` back to ``[B, Q, D]``."""
        return x_GSD.reshape(-1, self.blocks * self.block_steps, x_GSD.shape[2])[:, : self.queries]

    def align(self, bias: Tensor) -> Tensor:
        """Scores by distance ``[..., S, M + 1]`` to scores by key ``[..., S, W]``, elsewhere `HIDDEN`.

        Query s has its distances M..0 at keys s..s + M. Rows of W + 1 numbers, the distances first, read as
        rows of W are just that: each begins one number later (the relative shift of Dai et al., appendix B).
        """
        S, W = self.block_steps, self.memory + self.block_steps
        if S == 1:  # one query, as when acting: one key a distance
            return bias
        return pad(bias, (0, S), value=HIDDEN).flatten(-2)[..., : S * W].unflatten(-1, (S, W))

    def square(self, weights_GSW: Tensor) -> Tensor:
        """Weights of the blocks ``[B*N, S, W]`` as ``[B, T, T]``, where all T steps ask; no weights on the
        cache."""
        weights_BNSW = weights_GSW.unflatten(0, (-1, self.blocks))
        padded = self.blocks * self.block_steps
        square = weights_GSW.new_zeros(weights_BNSW.shape[0], padded, self.memory + padded)
        for n, start in enumerate(range(0, padded, self.block_steps)):
            stop = start + self.block_steps
            square[:, start:stop, start : self.memory + stop] = weights_BNSW[:, n]
        return square[:, : self.queries, self.memory : self.memory + self.queries]


def _pad_end(x_BT: Tensor, missing: int) -> Tensor:
    return pad(x_BT, (0, missing)) if missing else x_BT
