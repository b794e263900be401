"""``sum_r (W A^T) * B`` per row, W dense or packed: what DoRA's norm needs of a frozen weight, read once.

Legend: N = out features, K = in features, R = rank.

The sum is linear in W's columns and in the ranks: programs take pieces of both, and their results are added in an order
that the shape alone decides. The floor is the weight's way from memory: 2 N K bytes in bfloat16, for 4096 x 4096
33.6 MB and 10 us at an H100's 3.35 TB/s; 0.56 N K packed in blocks of 64.

Tensor cores multiply 16-bit numbers. A in float32 is the sum of three bfloat16 numbers, exact to 24 bits, so that
against a bfloat16 W three bfloat16 products with float32 sums equal the float32 one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.triton.rows import dot_operand
from rankwise.ops.triton.tile import DTYPE, buffers, decode, launching_on, power_of_two, round_to, row_tile

# Weight rows and columns that a program treats at once, the columns that it goes through, and its warps.
_ROWS, _COLUMNS, _RUN, _WARPS = 64, 64, 1024, 4
# The same of a packed weight. Decoding takes registers: fewer rows.
_PACKED_ROWS, _PACKED_COLUMNS = 16, 128
# Ranks at once: the fewest that tensor cores take, and how many fit beside the rest.
_FEWEST, _MOST = 16, 64


@triton.jit
def row_cross_kernel(
    W: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    sums: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride: tl.tensor,
    RUN: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """sums[piece] = ((W @ A.T) * B).sum(1), for ROWS rows, RANKS ranks and RUN columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    in_rows, in_ranks = row < N, rank < R
    first = tl.program_id(2) * RUN
    product = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(first, tl.minimum(first + RUN, K), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        w_place = W + row[:, None] * stride + column[None, :]
        w = tl.load(w_place, mask=in_rows[:, None] & (column < K)[None, :], other=0.0).to(A.dtype.element_ty)
        a_place = A + rank[None, :] * K + column[:, None]
        a = tl.load(a_place, mask=in_ranks[None, :] & (column < K)[:, None], other=0.0)
        product = tl.dot(dot_operand(w), dot_operand(a), product, input_precision="ieee")
    b = tl.load(B + row[:, None] * R + rank[None, :], mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
    piece = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + piece.to(tl.int64) * N + row, tl.sum(product * b, axis=1), mask=in_rows)


@triton.jit
def row_cross_4bit_kernel(
    packed: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    values: tl.tensor,
    dynamic_map: tl.tensor,
    A_first: tl.tensor,
    A_second: tl.tensor,
    B: tl.tensor,
    sums: tl.tensor,
    N: tl.tensor,
    row_spans: tl.tensor,
    row_bytes: tl.tensor,
    R: tl.tensor,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    RUN: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """As `row_cross_kernel` on the packed weight, rounded to ROUNDED; A's elements 2j and 2j + 1 lie apart."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    in_ranks = rank < R
    begin = tl.program_id(2) * RUN
    product = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(begin, tl.minimum(begin + RUN, row_spans), SPANS):
        spans = start + tl.arange(0, SPANS)
        pairs, scale = row_tile(
            rows, spans, N, row_spans, row_bytes, packed, absmax, nested_absmax, offset, dynamic_map, SPAN, BLOCK
        )
        first, second = decode(pairs, scale, values)
        byte = start * (SPAN // 2) + tl.arange(0, SPANS * SPAN // 2)
        a_place = rank[None, :] * row_bytes + byte[:, None]
        inside = in_ranks[None, :] & (byte < row_bytes)[:, None]
        a_first = tl.load(A_first + a_place, mask=inside, other=0.0)
        a_second = tl.load(A_second + a_place, mask=inside, other=0.0)
        first = round_to(tl.reshape(first, (ROWS, SPANS * SPAN // 2)), ROUNDED).to(A_first.dtype.element_ty)
        second = round_to(tl.reshape(second, (ROWS, SPANS * SPAN // 2)), ROUNDED).to(A_first.dtype.element_ty)
        product = tl.dot(dot_operand(first), dot_operand(a_first), product, input_precision="ieee")
        product = tl.dot(dot_operand(second), dot_operand(a_second), product, input_precision="ieee")
    inside_B = (rows < N)[:, None] & in_ranks[None, :]
    b = tl.load(B + rows.to(tl.int64)[:, None] * R + rank[None, :], mask=inside_B, other=0.0)
    piece = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + piece.to(tl.int64) * N + rows, tl.sum(product * b, axis=1), mask=rows < N)


def row_cross(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """sum_r (W A^T)_nr B_nr in float32: (N,)."""
    N, K = W.shape
    A, B = _operands(A, B, W.dtype)
    R = len(A)
    if N * K * R == 0:
        return torch.zeros(N, dtype=torch.float32, device=W.device)
    W = W if W.stride(1) == 1 else W.contiguous()
    ranks = _ranks(R)
    grid = (triton.cdiv(N, _ROWS), triton.cdiv(R, ranks), triton.cdiv(K, _RUN))
    sums = torch.empty((grid[1] * grid[2], N), dtype=torch.float32, device=W.device)
    with launching_on(W.device):
        row_cross_kernel[grid](
            W, A, B, sums, N, K, R, W.stride(0),
            RUN=_RUN, RANKS=ranks, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
    return sums.sum(0)


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """`row_cross` of the weight dequantized to ``dtype``. Its rows consist of whole blocks."""
    N, K = weight.shape
    A, B = _operands(A, B, dtype)
    R = len(A)
    if N * R == 0:
        return torch.zeros(N, dtype=torch.float32, device=A.device)
    columns, ranks = min(_PACKED_COLUMNS, power_of_two(K)), _ranks(R)
    span = min(weight.block_size, columns)
    run = max(_RUN, columns) // span
    grid = (triton.cdiv(N, _PACKED_ROWS), triton.cdiv(R, ranks), triton.cdiv(K // span, run))
    sums = torch.empty((grid[1] * grid[2], N), dtype=torch.float32, device=A.device)
    with launching_on(A.device):
        row_cross_4bit_kernel[grid](
            *buffers(weight), A[:, ::2].contiguous(), A[:, 1::2].contiguous(), B, sums, N, K // span, K // 2, R,
            ROUNDED=DTYPE[dtype], BLOCK=weight.block_size, SPAN=span, SPANS=columns // span, RUN=run, RANKS=ranks,
            ROWS=_PACKED_ROWS, num_warps=_WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return sums.sum(0)


def _operands(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A in the dtype in which it multiplies a W of ``dtype``, (R', K), and B to match, (N, R') float32."""
    if dtype != torch.bfloat16:
        return A.float().contiguous(), B.float().contiguous()
    if A.dtype == torch.bfloat16:
        return A.contiguous(), B.float().contiguous()
    parts = bfloat16_parts(A)
    return torch.cat(parts), B.float().repeat(1, len(parts))


def bfloat16_parts(A: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose sum is ``A.float()`` to 24 bits."""
    rest, parts = A.float(), []
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return parts


def _ranks(R: int) -> int:
    return min(max(power_of_two(R), _FEWEST), _MOST)
