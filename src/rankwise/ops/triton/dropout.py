"""Dropout whose mask is a hash of the seed and the flat index, that of `rankwise.ops.reference` to the bit.

The words of a key are passed to the kernels as signed 32-bit numbers without specialization, so that a new seed does
not cause a compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.reference import dropout_keys, dropout_threshold
from rankwise.ops.triton.tile import launching_on, round_to

# Elements per program, a divisor of 2^32, and its warps.
_ELEMENTS, _WARPS = 2048, 4


@triton.jit
def keep_mask(
    start: tl.tensor, before: tl.tensor, middle: tl.tensor, threshold: tl.tensor, ELEMENTS: tl.constexpr
) -> tl.tensor:
    """Which of the ELEMENTS elements from ``start``, a multiple of ELEMENTS, are kept."""
    # All these elements have one upper word of the index, which changes the keys from element 2^32 on.
    upper = (start >> 32).to(tl.uint32) * 0x9E3779B9
    index = start.to(tl.uint32) + tl.arange(0, ELEMENTS).to(tl.uint32)
    h = index + (before.to(tl.uint32) + upper)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) ^ (middle.to(tl.uint32) + upper)
    h = h * 0x846CA68B
    return (h ^ (h >> 16)) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["before", "middle", "threshold"])
def dropout_kernel(
    x: tl.tensor,
    y: tl.tensor,
    factor: tl.tensor,
    before: tl.tensor,
    middle: tl.tensor,
    threshold: tl.tensor,
    n: tl.tensor,
    ELEMENTS: tl.constexpr,
) -> None:
    """y = x * mask * factor."""
    start = tl.program_id(0).to(tl.int64) * ELEMENTS
    element = start + tl.arange(0, ELEMENTS)
    part = tl.load(x + element, mask=element < n, other=0.0).to(tl.float32)
    keep = keep_mask(start, before, middle, threshold, ELEMENTS)
    tl.store(y + element, round_to(tl.where(keep, part * factor, 0.0), y.dtype.element_ty), mask=element < n)


@triton.jit(do_not_specialize=["before", "middle", "threshold"])
def dropout_add_kernel(
    dx: tl.tensor,
    z: tl.tensor,
    factor: tl.tensor,
    before: tl.tensor,
    middle: tl.tensor,
    threshold: tl.tensor,
    n: tl.tensor,
    ELEMENTS: tl.constexpr,
) -> None:
    """dx = dx + z * mask * factor."""
    start = tl.program_id(0).to(tl.int64) * ELEMENTS
    element = start + tl.arange(0, ELEMENTS)
    part = tl.load(z + element, mask=element < n, other=0.0).to(tl.float32)
    total = tl.load(dx + element, mask=element < n, other=0.0).to(tl.float32)
    keep = keep_mask(start, before, middle, threshold, ELEMENTS)
    total = tl.where(keep, total + part * factor, total)
    tl.store(dx + element, round_to(total, dx.dtype.element_ty), mask=element < n)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """y_i = x_i / (1 - p) where the mask keeps it, else 0; i is the flat index of a contiguous x."""
    y = x.new_empty(x.shape)
    _launch(dropout_kernel, x.contiguous(), y, p, dropout_keys(seed))
    return y


def dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> Tensor:
    """dx_i <- dx_i + z_i / (1 - p) where the mask keeps z_i."""
    out = dx.contiguous()
    _launch(dropout_add_kernel, out, z.contiguous(), p, dropout_keys(seed))
    return dx if out is dx else dx.copy_(out)


def _launch(kernel: triton.JITFunction, first: Tensor, second: Tensor, p: float, keys: tuple[int, int]) -> None:
    """Both contiguous and of one size. Sums are not fused: the results are those of the reference to the bit."""
    n = first.numel()
    if n == 0:
        return
    words = [_signed(word) for word in (*keys, dropout_threshold(p))]
    with launching_on(first.device):
        kernel[(triton.cdiv(n, _ELEMENTS),)](
            first, second, 1 / (1 - p), *words, n, ELEMENTS=_ELEMENTS, num_warps=_WARPS, enable_fp_fusion=False
        )


def _signed(word: int) -> int:
    """The signed 32-bit number with the bits of ``word``."""
    return word - (word >> 31 << 32)
