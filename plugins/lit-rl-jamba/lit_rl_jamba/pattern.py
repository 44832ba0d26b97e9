"""Which layer is what: the options `pattern`, `n_layers`, `moe_every` and `moe_layers` read into layers.

A block is spelled by letters in order, `m` a Mamba layer and `a` an attention layer, or by the ratio ``m:a``
of both, which spreads a attention layers evenly over a block of l = m + a layers:

    attention layers of a block = { floor((i + 1/2) * l / a)  for i = 0 .. a-1 }.

One attention layer then stands at l // 2, where the released Jamba has it (``attn_layer_period`` 8,
``attn_layer_offset`` 4: ``7:1`` is ``mmmmammm``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAMBA, ATTENTION = "m", "a"


def spell_layers(pattern: str | int, n_layers: int | None = None) -> str:
    """The letters of all layers: one block, or as many as `n_layers` holds.

    Raises ValueError where `pattern` spells no layers, or `n_layers` is not a number of whole blocks: half a
    block would have another ratio than the one asked for.
    """
    block = _spell_block(pattern)
    if n_layers is None:
        return block
    if n_layers < 1 or n_layers % len(block):
        raise ValueError(
            f"n_layers={n_layers} is no number of whole blocks: pattern {pattern!r} is {len(block)} layers "
            f"({block}); give a multiple of {len(block)}, or spell the layers in pattern"
        )
    return block * (n_layers // len(block))


def _spell_block(pattern: str | int) -> str:
    if not isinstance(pattern, str):  # YAML 1.1 reads 3:1 as 3 * 60 + 1
        raise ValueError(
            f"pattern is {pattern!r}, no text; YAML makes a number of an unquoted ratio: quote it ('3:1') or "
            "spell the layers (mmam)"
        )
    if re.fullmatch(f"[{MAMBA}{ATTENTION}]+", pattern):
        return pattern
    ratio = re.fullmatch(r"(\d+):(\d+)", pattern)
    n_mamba, n_attention = (int(part) for part in ratio.groups()) if ratio else (0, 0)
    length = n_mamba + n_attention
    if not length:
        raise ValueError(
            f"pattern {pattern!r} spells no layer: give a ratio Mamba:attention like 3:1, or the letters m "
            "and a in order like mmam"
        )
    attention_at = {(2 * i + 1) * length // (2 * n_attention) for i in range(n_attention)}
    return "".join(ATTENTION if layer in attention_at else MAMBA for layer in range(length))


def expert_layers(n_layers: int, every: int, chosen: Sequence[int] | None = None) -> frozenset[int]:
    """Numbers from 0 of the layers with experts: `chosen`, else the last of each `every` layers.

    Jamba has them on layers 1, 3, 5, ... (``expert_layer_period`` 2, ``expert_layer_offset`` 1). Raises
    ValueError where that is no layer, or one that does not exist.
    """
    if chosen is None:
        layers = frozenset(range(every - 1, n_layers, every))
        if not layers:
            raise ValueError(
                f"moe_every={every} reaches none of the {n_layers} layers: lower it, or give moe_layers"
            )
        return layers
    strange = sorted(set(chosen) - set(range(n_layers)))
    if strange or not chosen:
        raise ValueError(f"moe_layers must name some of the layers 0 to {n_layers - 1}, not {list(chosen)}")
    return frozenset(chosen)
