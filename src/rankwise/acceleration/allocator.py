"""Keep freed memory. glibc returns large blocks to the system at every free, and each new block then costs page faults.

The thresholds hold for the whole process and cannot be read back, so they are set once and stay.
`limit_generated_kernels`, `share_one_heap` and `give_back_freed_memory` keep the held memory bounded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache

# Numbers of mallopt's parameters, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
# Blocks below come from the heap, where they are used again. Rows of ever different lengths would tear holes of larger
# blocks into it (2.1 GB at the peak of a run that takes 1.8 GB so), and an old glibc takes no more.
MMAP_BYTES = 32 << 20
# Free memory at the heap's end that is kept.
TRIM_BYTES = 1 << 30
TOP_PAD_BYTES = 64 << 20

# oneDNN generates code for every new number of tokens, and it and torch keep that of the last 1024 products: 6 MB a
# step of full fine-tuning, in small blocks that hold the heap's holes apart. A step has far fewer shapes than this.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}

# Under which torch looks for the settings of a card's allocator; the second is the newer name.
SEGMENT_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def limit_generated_kernels() -> None:
    """Let oneDNN keep fewer generated kernels. This acts before the process's first product; a user's own setting
    stays.
    """
    for name, value in KERNEL_CACHES.items():
        os.environ.setdefault(name, value)


def grow_segments() -> str:
    """Let a card's memory segments grow, so that batches of ever different lengths leave no holes. Returns torch's
    settings.

    This acts before the process's first tensor on a card; a user's own setting stays.
    """
    name = next((name for name in SEGMENT_SETTINGS if name in os.environ), SEGMENT_SETTINGS[0])
    if sys.platform.startswith("linux"):
        os.environ.setdefault(name, "expandable_segments:True")
    return os.environ.get(name, "")


@cache
def keep_freed_memory() -> bool:
    """Raise glibc's thresholds. Returns False under another allocator."""
    if not _has_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((M_MMAP_THRESHOLD, MMAP_BYTES), (M_TRIM_THRESHOLD, TRIM_BYTES), (M_TOP_PAD, TOP_PAD_BYTES))
    # Every one is set, whether or not another is refused.
    taken = [mallopt(parameter, value) == 1 for parameter, value in wanted]
    return all(taken)


def share_one_heap() -> None:
    """Let threads that begin later allocate from the main heap. Does nothing without glibc.

    gloo copies each tensor that it gathers, in threads of its own. glibc would give each of them a heap, which keeps
    what was freed: 85 MB of 480 in a process of FSDP2 (demo model, LoRA, 2 processes).
    """
    if _has_glibc():
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Return the heap's free pages to the system, also those between blocks in use. Does nothing without glibc."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
