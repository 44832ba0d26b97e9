"""What loops are compiled for."""

import numba
import numpy as np
import pytest

from lit_rl.compiled import Array, jit

HOST = jit.get_host_cpu_features()


def doubled(x: Array) -> None:
    for i in range(x.shape[0]):
        x[i] += x[i]


@pytest.mark.parametrize(
    ("told", "processor", "expected"),
    [
        (None, "+avx512f,+avx512bf16", "+avx512f,+avx512bf16,-prefer-256-bit"),
        (None, "+avx512f,-avx512bf16", None),
        (None, "+neon", None),
        (None, "", None),
        ("+avx2", "+avx512f,+avx512bf16", "+avx2"),
        ("", "+avx512f,+avx512bf16", ""),
    ],
)
def test_registers_are_filled_where_that_does_not_slow_the_clock(
    told: str | None, processor: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CPU_FEATURES", told)
    monkeypatch.setattr(jit, "get_host_cpu_features", lambda: processor)
    jit.fill_registers()
    assert expected == numba.config.CPU_FEATURES


def test_loops_are_compiled_so() -> None:
    loop = numba.njit(doubled)  # not kept on disk, from where its code could not be read
    x = np.arange(5, dtype=np.float32)
    loop(x)
    assert x.tolist() == [0, 2, 4, 6, 8]
    [code] = loop.inspect_asm().values()
    assert ("zmm" in code) is ("+avx512bf16" in HOST.split(","))
