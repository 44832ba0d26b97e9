"""What loops are compiled for."""

import subprocess
import sys

import numba
import pytest

from lit_rl.compiled import jit

HOST = jit.get_host_cpu_features()
LOOP = """
import lit_rl.compiled.jit
import numba
import numpy as np

def doubled(x):
    for i in range(x.shape[0]):
        x[i] += x[i]

loop = numba.njit(doubled)
loop(np.zeros(5, np.float32))
[code] = loop.inspect_asm().values()
print("zmm" in code)
"""


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
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str("+avx512bf16" in HOST.split(","))
