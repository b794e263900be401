"""Row norms of the dequantized weight, from its n / 2 bytes of codes and its scales; no dense weight is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.triton.tile import DTYPE, buffers, decode, launching_on, power_of_two, round_to, row_tile

# Rows, and elements of a row, that a program processes at once, and its warps.
_ROWS, _COLUMNS, _WARPS = 4, 1024, 4


@triton.jit
def row_norms_kernel(
    packed: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    values: tl.tensor,
    dynamic_map: tl.tensor,
    norms: tl.tensor,
    N: tl.tensor,
    row_spans: tl.tensor,
    row_bytes: tl.tensor,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """norms = vector_norm(w'.to(ROUNDED), dim=1), float32, for ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, SPANS, SPAN // 2), tl.float32)
    for start in range(0, row_spans, SPANS):
        spans = start + tl.arange(0, SPANS)
        pairs, scale = row_tile(
            rows, spans, N, row_spans, row_bytes, packed, absmax, nested_absmax, offset, dynamic_map, SPAN, BLOCK
        )
        first, second = decode(pairs, scale, values)
        first, second = round_to(first, ROUNDED).to(tl.float32), round_to(second, ROUNDED).to(tl.float32)
        total = tl.fma(first, first, tl.fma(second, second, total))
    squares = tl.sum(tl.sum(total, axis=2), axis=1)
    tl.store(norms + rows, tl.sqrt_rn(squares), mask=rows < N)


def row_norms(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """||W'_n|| over K, float32 (N,), of W' rounded to ``dtype``. Rows of W' consist of whole blocks."""
    N, K = weight.shape
    norms = weight.codes.new_empty(N, dtype=torch.float32)
    if N == 0:
        return norms
    columns = min(_COLUMNS, power_of_two(K))
    span = min(weight.block_size, columns)
    with launching_on(norms.device):
        row_norms_kernel[(triton.cdiv(N, _ROWS),)](
            *buffers(weight),
            norms,
            N,
            K // span,
            K // 2,
            ROUNDED=DTYPE[dtype],
            BLOCK=weight.block_size,
            SPAN=span,
            SPANS=columns // span,
            ROWS=_ROWS,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return norms
