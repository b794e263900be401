"""Keep freed memory: glibc gives large blocks back to the system at every free, and each comes back as page faults.

The thresholds hold for the whole process and cannot be read back, so they are set once and stay.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

# Numbers of mallopt's parameters, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MMAP_BYTES = 32 << 20
# Blocks below come from the heap, where they are used again. Rows of ever different lengths would tear holes of larger
# blocks into it (2.1 GB at the peak of a run that takes 1.8 GB so), and an old glibc takes no more.
TRIM_BYTES = 1 << 30
# Free memory at the heap's end that is kept.
TOP_PAD_BYTES = 64 << 20


@cache
def keep_freed_memory() -> bool:
    """Raise glibc's thresholds; False where another allocator is at work."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((M_MMAP_THRESHOLD, MMAP_BYTES), (M_TRIM_THRESHOLD, TRIM_BYTES), (M_TOP_PAD, TOP_PAD_BYTES))
    # Every one is set, whether or not another is refused.
    taken = [mallopt(parameter, value) == 1 for parameter, value in wanted]
    return all(taken)
