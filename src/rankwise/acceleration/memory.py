"""Memory of a training process: freed blocks are kept.

glibc returns large blocks at every free, and each new block costs page faults. The thresholds apply to the whole
process and cannot be read back, so they are set once and stay. `limit_generated_kernels`, `share_one_heap` and
`give_back_freed_memory` bound the memory that is kept.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

import psutil

# mallopt's parameters, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
# Smaller blocks come from the heap, which reuses them. With rows of varying lengths, larger blocks would fragment the
# heap (2.1 GB at the peak of a run instead of 1.8 GB), and old versions of glibc accept no larger threshold.
MMAP_BYTES = 32 << 20
# Bytes of free memory at the end of the heap that are kept.
TRIM_BYTES = 1 << 30
TOP_PAD_BYTES = 64 << 20

# oneDNN generates code for every new number of tokens. It and torch each keep that of their last 1024 products, each of
# a quarter of a MB, in small blocks that fragment the heap. A micro-batch has up to 20 shapes of products.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}

# Environment variables of torch's CUDA allocator; the second is the newer name.
SEGMENT_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def limit_generated_kernels() -> None:
    """Let oneDNN keep fewer generated kernels. Effective before the first product of the process; a user's setting is
    kept.
    """
    for name, value in KERNEL_CACHES.items():
        os.environ.setdefault(name, value)


def grow_segments() -> str:
    """Enable expandable segments on a GPU, so that batches of varying lengths do not fragment its memory. Returns
    torch's settings.

    Effective before the process's first tensor on a GPU; a user's setting is kept.
    """
    name = next((name for name in SEGMENT_SETTINGS if name in os.environ), SEGMENT_SETTINGS[0])
    if sys.platform.startswith("linux"):
        os.environ.setdefault(name, "expandable_segments:True")
    return os.environ.get(name, "")


@cache
def keep_freed_memory() -> bool:
    """Raise glibc's thresholds. Returns False under a different allocator."""
    if not _has_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((M_MMAP_THRESHOLD, MMAP_BYTES), (M_TRIM_THRESHOLD, TRIM_BYTES), (M_TOP_PAD, TOP_PAD_BYTES))
    # All are set, even if one is refused.
    taken = [mallopt(parameter, value) == 1 for parameter, value in wanted]
    return all(taken)


def share_one_heap() -> None:
    """Let threads that start later allocate from the main heap. Does nothing without glibc.

    gloo copies each tensor that it gathers, in threads of its own. glibc would give each thread a heap, which keeps
    freed memory: 85 of 480 MB in a process of FSDP2 (demo model, LoRA, 2 processes).
    """
    if _has_glibc():
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Return the heap's free pages to the system, also those between blocks in use. Does nothing without glibc."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def anonymous_memory_bytes() -> int:
    """The anonymous resident memory of this process in bytes; on systems other than Linux, all resident memory."""
    try:
        status = Path(f"/proc/{os.getpid()}/status").read_text()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def _has_glibc() -> bool:
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
