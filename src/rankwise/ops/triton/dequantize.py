"""Packed codes to a dense weight, with double quantization in the same kernel.

For a weight of n elements it reads n / 2 bytes of codes and 4 (double-quantized: 1) bytes per block, and writes n
elements: for bfloat16 and blocks of 64, 2.56 bytes per element. This traffic is the lower bound: 43 MB for
4096 x 4096, 13 us at an H100's 3.35 TB/s and 43 us at an RTX 4090's 1.0 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops import reference
from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.triton.tile import block_scales, buffers, decode, launching_on, round_to

# Elements per program and warps: 16 bytes of codes per thread, the widest load there is.
_ELEMENTS, _WARPS = 4096, 4


@triton.jit
def dequantize_kernel(
    packed: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    values: tl.tensor,
    dynamic_map: tl.tensor,
    out: tl.tensor,
    gain: tl.tensor,
    n: tl.tensor,
    n_bytes: tl.tensor,
    row_blocks: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """out.view(-1)[i] = value[code_i] * absmax[i // BLOCK], for the BLOCKS blocks of one program; times the gain of its
    row, which holds ``row_blocks`` blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    start = block * BLOCK
    scale = block_scales(block, start < n, absmax, nested_absmax, offset, dynamic_map)
    if gain is not None:
        scale *= tl.load(gain + block // row_blocks, mask=start < n, other=0.0)
    byte = (block * (BLOCK // 2))[:, None] + tl.arange(0, BLOCK // 2)[None, :]
    pairs = tl.load(packed + byte, mask=byte < n_bytes, other=0)
    first, second = decode(pairs, scale[:, None], values)
    element = start[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(out + element, round_to(tl.interleave(first, second), out.dtype.element_ty), mask=element < n)


def dequantize_gained_4bit(weight: PackedWeight, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """gain * W' by rows, in ``dtype``."""
    if not weight.rows_are_blocks:
        return reference.dequantize_gained_4bit(weight, gain, dtype)
    return dequantize(weight, dtype, gain.contiguous())


def dequantize(weight: PackedWeight, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
    """W' = value[code] * absmax in ``dtype``, equal to the reference to the bit; ``gain``: of rows of whole blocks."""
    out, n = weight.codes.new_empty(weight.shape, dtype=dtype), weight.elements
    if n == 0:
        return out
    with launching_on(out.device):
        dequantize_kernel[(triton.cdiv(n, _ELEMENTS),)](
            *buffers(weight),
            out,
            gain,
            n,
            (n + 1) // 2,
            1 if gain is None else weight.shape[1] // weight.block_size,
            BLOCK=weight.block_size,
            BLOCKS=_ELEMENTS // weight.block_size,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return out
