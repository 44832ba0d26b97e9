"""What compiled loops share: small products against torch's, for sizes that do and do not come out even."""

import numba
import numpy as np
import pytest
import torch

from lit_rl.compiled import arrays, can_be_compiled
from lit_rl.compiled.exp import exp, exp2
from lit_rl.compiled.jit import jit_in_order
from lit_rl.compiled.products import (
    PART,
    add_inner_products,
    add_outer_products,
    add_product,
)

SIZES = [(1, 1, 1), (2, 4, 8), (3, 5, 7), (8, 12, 33), (5, 3, 64), (4, 0, 3)]


def matrices(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_add_product(rows, inner, columns):
    out, left, right = matrices((rows, columns), (rows, inner), (inner, columns))
    expected = out + left @ right
    turned = left.T.contiguous()
    for factor in (left, turned.T):  # as it lies and transposed
        found = out.clone()
        add_product(*arrays(found, factor, right))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_add_inner_products(rows, inner, columns):
    out, left, right = matrices((rows, columns), (rows, inner), (columns, inner))
    expected = out + left @ right.T
    add_inner_products(*arrays(out, left, right))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("steps", [1, PART, PART + 1, 3 * PART - 1])
def test_add_outer_products(steps):
    out, part, left, right = matrices((6, 9), (6, 9), (steps, 6), (steps, 9))
    expected = out + left.T @ right
    add_outer_products(*arrays(out, left, right, part))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)


def test_parts_keep_the_rounding_of_long_sums_small():
    ones = torch.full((2**19, 1), 0.1)
    out, part = torch.zeros(1, 1), torch.zeros(1, 1)
    add_outer_products(*arrays(out, ones, ones, part))
    exact = 2**19 * ones[0].double().item() ** 2
    assert abs(out.item() - exact) < 1e-4 * exact


def test_only_floats_of_one_type_on_the_cpu_can_be_compiled():
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert can_be_compiled(single, single)
    assert can_be_compiled(double)
    assert not can_be_compiled(single, double)
    assert not can_be_compiled(single.bfloat16())
    assert not can_be_compiled(single, torch.zeros(1, device="meta"))


def test_exponential_is_exact_to_two_units_in_the_last_place():
    @jit_in_order
    def exponentials(x, y):
        for i in range(y.shape[0]):
            y[i] = exp(x[i])

    x = np.linspace(-87, 88, 1_000_001, dtype=np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(y - exact) / exact).max() < 2 * np.finfo(np.float32).eps
    beyond = np.array([-1e4, 1e4, np.nan], np.float32)
    exponentials(beyond, y[:3])
    assert 0 < y[0] < 1e-37
    assert 1e38 < y[1] < np.inf
    assert np.isnan(y[2])


def test_power_of_two():
    @jit_in_order
    def powers(x, y):
        for i in range(y.shape[0]):
            y[i] = exp2(x[i])

    x = np.concatenate([np.linspace(-126, 127, 1_000_001), np.linspace(-1, 0, 1_000_001)]).astype(np.float32)
    y = np.empty_like(x)
    powers(x, y)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(y - exact) / exact).max() < 1.7e-7
    whole = np.arange(-126, 128, dtype=np.float32)
    powers(whole, y[: len(whole)])
    # Exact, so that a decay of nothing forgets nothing; numpy's own float32 exp2 is not, at 127 with AVX-512.
    assert (y[: len(whole)] == np.ldexp(np.float32(1), whole.astype(int))).all()
    beyond = np.array([-1e4, -np.inf, np.nan, np.nan], np.float32)
    beyond[3:].view(np.int32)[:] = 0x7FC00001  # not a number either
    powers(beyond, y[:4])
    assert 0 < y[0] < 1e-37
    assert 0 < y[1] < 1e-37
    assert np.isnan(y[2:4]).all()
    double = np.linspace(-300, 300, 1001)
    found = np.empty_like(double)
    powers(double, found)
    np.testing.assert_allclose(found, np.exp2(double), rtol=1e-15)


def test_loops_compile_where_nothing_can_be_kept(monkeypatch):
    """As where neither the source's folder nor the user's cache can be written."""
    compiled = numba.njit

    def without_cache(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(**options)

    monkeypatch.setattr(numba, "njit", without_cache)

    @jit_in_order
    def double(x):
        for i in range(x.shape[0]):
            x[i] *= 2

    x = np.ones(3)
    double(x)
    assert x.tolist() == [2, 2, 2]
