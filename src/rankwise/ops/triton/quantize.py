"""A dense weight to packed codes, whole blocks only: n elements are read once, n / 2 bytes and the scales written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops import packed_weight
from rankwise.ops.reference import _TINY
from rankwise.ops.triton.tile import launching_on

TINY = tl.constexpr(_TINY)

# Elements per program and its warps. The largest block fits one program.
_ELEMENTS, _WARPS = 4096, 8


@triton.jit
def quantize_kernel(
    w: tl.tensor,
    bounds: tl.tensor,
    order: tl.tensor,
    packed: tl.tensor,
    absmax: tl.tensor,
    n: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """The codes and scales of BLOCKS blocks. A block with NaN or Inf gets a scale of NaN or Inf; the caller raises."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = (block * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = block * BLOCK < n
    part = tl.load(w + element, mask=inside[:, None], other=0.0).to(tl.float32)
    # As integers, magnitudes sort like floats and NaN comes out above Inf, which a maximum of floats would drop.
    largest = tl.max(part.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    normal = part * tl.div_rn(1.0, tl.maximum(largest, TINY))[:, None]
    below = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for i in tl.static_range(15):
        below += (normal > tl.load(bounds + i)).to(tl.int32)
    code = tl.load(order + below).to(tl.int32)
    first, second = tl.split(tl.reshape(code, (BLOCKS, BLOCK // 2, 2)))
    byte = (block * (BLOCK // 2))[:, None] + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + byte, ((first << 4) | second).to(tl.uint8), mask=inside[:, None])
    tl.store(absmax + block, largest, mask=inside)


def quantize_blocks(w: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, block_size: int) -> None:
    """Fill ``packed`` (n / 2,) and ``absmax`` (n / block,) from w (n,), contiguous, n a multiple of the block."""
    n, device = w.numel(), w.device
    if n == 0:
        return
    with launching_on(device):
        quantize_kernel[(triton.cdiv(n, _ELEMENTS),)](
            w,
            packed_weight.code_bounds(quant_type, device),
            packed_weight.code_order(quant_type, device),
            packed,
            absmax,
            n,
            BLOCK=block_size,
            BLOCKS=_ELEMENTS // block_size,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
