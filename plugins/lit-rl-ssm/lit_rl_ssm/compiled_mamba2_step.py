"""One step of a Mamba-2 layer compiled by numba, for acting: on one core of the CPU, without gradient.

The equations of `mamba2`, all in one call: with few rows each operation of its own costs more than its
arithmetic.

Arrays: x, y [B, D]; projected [B, 2 E + 2 N + H], of each row z, x, B, C and dt in turn; past, past_next
[B, W - 1, E + 2 N], the convolution's last inputs; taps [W, E + 2 N]; h, h_next [B, H, P, N]; is_init [B];
room for one row's newest and mixed [E + 2 N], B and C [N], and for gated [B, E]; the rest are parameters.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from lit_rl.compiled import Array, arrays
from lit_rl.compiled.exp import exp
from lit_rl.compiled.jit import jit
from lit_rl.compiled.products import add_inner_products


def compiled_mamba2_step(
    x_BD: Tensor,
    state: dict[str, Tensor],
    is_init_B: Tensor,
    *,
    in_proj: Tensor,
    taps_CW: Tensor,
    taps_bias_C: Tensor,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_E: Tensor,
    out_proj: Tensor,
    eps: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output ``[B, D]`` and its next state.

    Args:
        x_BD: input.
        state: of `mamba2.Mamba2Mixer`.
        is_init_B: bool, true where the state is cleared before the step.
        in_proj: ``[2 E + 2 N + H, D]``.
        taps_CW: the convolution's weights, C = E + 2 N.
        taps_bias_C: its bias.
        dt_bias_H: added to dt before the softplus.
        A_log_H: logarithm of the decay rates.
        D_H: the skip.
        norm_E: weights of the gated norm.
        out_proj: ``[D, E]``.
        eps: of the norm.
    """
    past_BPC, h_BHPN = state["conv"].transpose(1, 2).contiguous(), state["ssm"].contiguous()
    inputs = (x_BD, in_proj, past_BPC, taps_CW.t(), taps_bias_C, dt_bias_H, A_log_H, D_H, norm_E, out_proj)
    inputs = tuple(tensor.contiguous() for tensor in (*inputs, h_BHPN, is_init_B))
    past_next_BPC, h_next_BHPN = past_BPC.new_empty(past_BPC.shape), h_BHPN.new_empty(h_BHPN.shape)
    rows, taps, d_state = len(x_BD), len(taps_bias_C), h_BHPN.shape[3]
    y_BD, projected = x_BD.new_zeros(rows, len(out_proj)), x_BD.new_zeros(rows, len(in_proj))
    sizes = ((taps,), (taps,), (d_state,), (d_state,), (rows, len(norm_E)))
    room = [x_BD.new_empty(size) for size in sizes]
    _step(*arrays(*inputs, past_next_BPC, h_next_BHPN, y_BD, projected, *room), eps)
    return y_BD, {"conv": past_next_BPC.transpose(1, 2), "ssm": h_next_BHPN}


@jit
def _step(
    x: Array,
    in_proj: Array,
    past: Array,
    taps: Array,
    taps_bias: Array,
    dt_bias: Array,
    A_log: Array,
    skip: Array,
    norm: Array,
    out_proj: Array,
    h: Array,
    is_init: Array,
    past_next: Array,
    h_next: Array,
    y: Array,
    projected: Array,
    newest: Array,
    mixed: Array,
    B: Array,
    C: Array,
    gated: Array,
    eps: float,
) -> None:
    """Of one row `newest` and `mixed` [E + 2 N] stand before and behind the convolution; gated [B, E]."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    rows, heads, headdim, d_state = h.shape
    channels, last = heads * headdim, past.shape[1]
    add_inner_products(projected, x, in_proj)
    for b in range(rows):
        row, g = projected[b], gated[b]
        # Copied first: numba makes vectors of loops that need no offset.
        for c in range(newest.shape[0]):
            newest[c] = row[channels + c]
        tap = taps[last]
        for c in range(mixed.shape[0]):
            mixed[c] = taps_bias[c] + tap[c] * newest[c]
        for k in range(last):
            tap, seen = taps[k], past[b, k]
            if is_init[b]:
                for c in range(seen.shape[0]):
                    past_next[b, k, c] = zero
                continue
            for c in range(mixed.shape[0]):
                mixed[c] += tap[c] * seen[c]
            if k > 0:
                past_next[b, k - 1] = seen
        if last > 0:
            past_next[b, last - 1] = newest
        for c in range(mixed.shape[0]):
            mixed[c] /= one + exp(-mixed[c])
        for n in range(d_state):
            B[n], C[n] = mixed[channels + n], mixed[channels + d_state + n]

        for j in range(heads):
            v = row[channels + newest.shape[0] + j] + dt_bias[j]
            dt = max(v, zero) + x.dtype.type(math.log1p(math.exp(-abs(v))))
            decay = zero if is_init[b] else exp(-dt * exp(A_log[j]))
            for p in range(headdim):
                e = j * headdim + p
                h_p, next_p, write, read = h[b, j, p], h_next[b, j, p], dt * mixed[e], zero
                for n in range(next_p.shape[0]):
                    value = decay * h_p[n] + write * B[n]
                    next_p[n] = value
                    read += value * C[n]
                g[e] = read + skip[j] * mixed[e]

        total = zero
        for e in range(g.shape[0]):
            g[e] *= row[e] / (one + exp(-row[e]))
            total += g[e] * g[e]
        scale = x.dtype.type(1 / np.sqrt(total / channels + eps))
        for e in range(g.shape[0]):
            g[e] *= scale * norm[e]
    add_inner_products(y, gated, out_proj)
