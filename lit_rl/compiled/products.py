"""Products of small matrices inside compiled loops.

A library call costs more than such a product. Four rows of the right factor are taken at a time, so that
what is added to is loaded and stored a fourth as often. The innermost loops become vector instructions if
they run over the length of the row that is written to; over the length of another array they stay scalar.
"""

from __future__ import annotations

from lit_rl.compiled import Array
from lit_rl.compiled.jit import jit

# Terms that are added up before they join a total: keeps rounding small where there are many.
PART = 256


@jit
def add_product(out: Array, left: Array, right: Array) -> None:
    """``out [I, Q] += left [I, K] @ right [K, Q]``; rows of `right` and `out` must lie whole in memory."""
    rows, inner = out.shape[0], right.shape[0]
    whole, pairs = inner - inner % 4, rows - rows % 2
    for k in range(0, whole, 4):
        r0, r1, r2, r3 = right[k], right[k + 1], right[k + 2], right[k + 3]
        for i in range(0, pairs, 2):
            out_i, v0, v1, v2, v3 = out[i], left[i, k], left[i, k + 1], left[i, k + 2], left[i, k + 3]
            m = i + 1
            out_m, w0, w1, w2, w3 = out[m], left[m, k], left[m, k + 1], left[m, k + 2], left[m, k + 3]
            for q in range(out_i.shape[0]):
                x0, x1, x2, x3 = r0[q], r1[q], r2[q], r3[q]
                out_i[q] += v0 * x0 + v1 * x1 + v2 * x2 + v3 * x3
                out_m[q] += w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        for i in range(pairs, rows):
            out_i, v0, v1, v2, v3 = out[i], left[i, k], left[i, k + 1], left[i, k + 2], left[i, k + 3]
            for q in range(out_i.shape[0]):
                out_i[q] += v0 * r0[q] + v1 * r1[q] + v2 * r2[q] + v3 * r3[q]
    for k in range(whole, inner):
        for i in range(rows):
            out_i, r0, v0 = out[i], right[k], left[i, k]
            for q in range(out_i.shape[0]):
                out_i[q] += v0 * r0[q]


@jit
def add_inner_products(out: Array, left: Array, right: Array) -> None:
    """``out [I, K] += left [I, Q] @ right [K, Q].T``; rows of both factors must lie whole in memory."""
    zero = out.dtype.type(0)
    rows = right.shape[0]
    whole = rows - rows % 4
    for k in range(0, whole, 4):
        r0, r1, r2, r3 = right[k], right[k + 1], right[k + 2], right[k + 3]
        for i in range(out.shape[0]):
            left_i, s0, s1, s2, s3 = left[i], zero, zero, zero, zero
            for q in range(left_i.shape[0]):
                s0 += left_i[q] * r0[q]
                s1 += left_i[q] * r1[q]
                s2 += left_i[q] * r2[q]
                s3 += left_i[q] * r3[q]
            out[i, k] += s0
            out[i, k + 1] += s1
            out[i, k + 2] += s2
            out[i, k + 3] += s3
    for k in range(whole, rows):
        for i in range(out.shape[0]):
            left_i, r0, s0 = left[i], right[k], zero
            for q in range(left_i.shape[0]):
                s0 += left_i[q] * r0[q]
            out[i, k] += s0


@jit
def add_outer_products(out: Array, left: Array, right: Array, part: Array) -> None:
    """``out [I, Q] += left [N, I].T @ right [N, Q]``, over N steps; `part` is room like `out`."""
    zero = out.dtype.type(0)
    for start in range(0, right.shape[0], PART):
        now = slice(start, start + PART)
        for i in range(out.shape[0]):
            part_i = part[i]
            for q in range(part_i.shape[0]):
                part_i[q] = zero
        add_product(part, left[now].T, right[now])
        for i in range(out.shape[0]):
            out_i, part_i = out[i], part[i]
            for q in range(out_i.shape[0]):
                out_i[q] += part_i[q]
