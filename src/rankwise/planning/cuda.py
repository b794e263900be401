"""Memory of a CUDA device that a trace on the CPU does not show. Imports no torch."""

from __future__ import annotations

MIB = 1 << 20
# The caching allocator hands out multiples of this (c10/cuda/CUDACachingAllocator: kMinBlockSize).
ROUNDING_BYTES = 512
# Blocks up to the first come out of 2 MiB segments, up to the second out of 20 MiB ones.
SMALL_BYTES, LARGE_BYTES = MIB, 10 * MIB


def rounded(size_bytes: int) -> int:
    """A block as the caching allocator counts it: ceil(size / 512) * 512."""
    return -(-size_bytes // ROUNDING_BYTES) * ROUNDING_BYTES


def workspace_bytes() -> int:
    """cuBLAS' workspace, from torch's allocator: 32 MiB on Hopper, 8.1 MiB before; the larger is taken."""
    return 32 * MIB


def context_bytes() -> int:
    """The CUDA context with torch's kernels, outside of the allocator: 300 to 550 MB by card and driver."""
    return 500 * MIB


def fragmentation_bytes(peak_bytes: int) -> int:
    """Segments that the allocator has reserved and cannot use: about 2 % of the peak in steady training."""
    return peak_bytes // 50
