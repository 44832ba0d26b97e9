"""e^x and 2^x for loops that numba compiles."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba.extending import overload


def exp(x: Any) -> Any:
    """e^x inside compiled loops; in float32 to two units in the last place, x clamped to [-87.3365, 88]:
    below lie numbers of fewer digits.

    The float32 one has no call and no branch, so that a loop around it becomes vector instructions: with
    n = round(x / ln 2), e^x = 2^n e^(x - n ln 2), the power of two built from its bits and the rest, at most
    ln(2)/2 in size, by Taylor's series up to x^7 (remainder below 6e-9).
    """
    return math.exp(x)


_LOG2_E = np.float32(1 / math.log(2))
# Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits of the sum.
_ROUND = np.float32(1.5 * 2**23)
# ln 2 in two parts; n times the first, which has nine bits, is exact.
_LN2_HIGH, _LN2_LOW = np.float32(355 / 512), np.float32(math.log(2) - 355 / 512)
_ONE, _SMALLEST, _LARGEST = np.float32(1), np.float32(-87.3365), np.float32(88)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(k)) for k in range(2, 8))


# A product and a sum may become one instruction, which only adds digits; to reassociate may simplify away
# the rounding by an addition.
@overload(exp, jit_options={"fastmath": {"contract"}})
def _compiled_exp(x):  # type: ignore[no-untyped-def]
    """`x` is the type of the argument; numba wants neither this nor what it returns annotated."""
    if x != numba.float32:
        return lambda x: math.exp(x)

    def exp_float32(x):  # type: ignore[no-untyped-def]
        x = min(max(x, _SMALLEST), _LARGEST)
        shifted = x * _LOG2_E + _ROUND
        n = shifted - _ROUND
        f = (x - n * _LN2_HIGH) - n * _LN2_LOW
        series = ((((((_C7 * f + _C6) * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _ONE) * f + _ONE
        exponent_bits = np.int32((np.float32(shifted).view(np.int32) + 127) << 23)
        return series * np.int32(exponent_bits).view(np.float32)

    return exp_float32


def exp2(x: Any) -> Any:
    """2^x inside compiled loops, for x of at most 127; in float32 with a relative error of at most 1.7e-7, x
    clamped to -126 below.

    For whoever has exponents of two: it takes three quarters of the operations of `exp`. What x has beside
    the nearest whole number is exact; its power of two is 1 plus a polynomial of degree 5, whose largest
    relative error is as small as it gets.
    """
    return 2.0**x


_P1, _P2, _P3 = np.float32(0.69314698), np.float32(0.24022242), np.float32(0.055507337)
_P4, _P5 = np.float32(0.0096715126), np.float32(0.0013264727)
_SMALLEST_POWER = np.float32(-126)


@overload(exp2, jit_options={"fastmath": {"contract"}})
def _compiled_exp2(x):  # type: ignore[no-untyped-def]
    if x != numba.float32:
        return lambda x: np.exp2(x)

    def exp2_float32(x):  # type: ignore[no-untyped-def]
        x = max(x, _SMALLEST_POWER)
        shifted = x + _ROUND
        f = x - (shifted - _ROUND)
        series = ((((_P5 * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f + _ONE
        exponent_bits = np.int32((np.float32(shifted).view(np.int32) + 127) << 23)
        return series * np.int32(exponent_bits).view(np.float32)

    return exp2_float32
