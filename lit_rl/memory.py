"""What this process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h; the second is the largest that it takes.
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 2**30
M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES = -3, 2**25


def keep_freed_memory() -> None:
    """Keeps up to a GiB that is freed, in pieces of up to 32 MiB, in place of giving it back and asking anew.

    A recurrent state of some megabytes, made and dropped at every update, otherwise costs a page fault for
    each 4 KiB each time. With another C library than glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
