"""Freed memory is kept: page faults of memory used again and again, counted in processes of their own."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from lit_rl.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc, size = ctypes.CDLL(None), 2**22
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def used():
    pieces = [libc.malloc(size) for _ in range(8)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    for piece in pieces:
        libc.free(piece)
for _ in range(5):
    used()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    used()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_what_is_freed_is_used_again() -> None:
    assert page_faults("kept") < 100
    assert page_faults("given back") > 10_000  # or there would be nothing to gain
