"""``sum_r (W A^T) * B`` per row, W dense or packed: the term of DoRA's norm that reads the frozen weight; and DoRA's
gain, which a second kernel computes from it.

Legend: N = out features, K = in features, R = rank.

The sum is linear in W's columns and in the ranks: programs take pieces of both, and their results are added in an order
that depends on the shape only. The lower bound is the traffic of the weight: 2 N K bytes in bfloat16, for 4096 x 4096
33.6 MB and 10 us at an H100's 3.35 TB/s; 0.56 N K packed in blocks of 64.

Tensor cores multiply 16-bit numbers. A in float32 is the sum of three bfloat16 numbers, exact to 24 bits, so that
against a bfloat16 W three bfloat16 products with float32 sums equal the float32 one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops import reference
from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.triton.tile import DTYPE, buffers, decode, dot_operand, launching_on, power_of_two, round_to, row_tile

# Weight rows and columns that a program processes at once, all of its columns, and its warps.
_ROWS, _COLUMNS, _RUN, _WARPS = 64, 64, 1024, 4
# The same for a packed weight: fewer rows, because decoding takes registers.
_PACKED_ROWS, _PACKED_COLUMNS = 16, 128
# Ranks at once: the minimum for tensor cores, the maximum, and the maximum for a dense weight with A in float32, whose
# three parts are in registers together.
_FEWEST, _MOST, _MOST_IN_PARTS = 16, 64, 32
# Rows of a program of gain_kernel, its maximum ranks at once, and its warps.
_GAIN_ROWS, _GAIN_RANKS, _GAIN_WARPS = 32, 32, 4


@triton.jit
def add_product(w: tl.tensor, a: tl.tensor, product: tl.tensor) -> tl.tensor:
    """product + w @ a, to float32's precision: w in bfloat16 or float32, a in bfloat16 or float32."""
    if w.dtype == tl.bfloat16:
        part = round_to(a.to(tl.float32), tl.bfloat16)
        product = tl.dot(dot_operand(w), dot_operand(part), product, input_precision="ieee")
        if a.dtype == tl.float32:
            rest = a - part.to(tl.float32)
            part = round_to(rest, tl.bfloat16)
            product = tl.dot(dot_operand(w), dot_operand(part), product, input_precision="ieee")
            part = round_to(rest - part.to(tl.float32), tl.bfloat16)
            product = tl.dot(dot_operand(w), dot_operand(part), product, input_precision="ieee")
    else:
        product = tl.dot(w.to(tl.float32), a.to(tl.float32), product, input_precision="ieee")
    return product


@triton.jit
def row_cross_kernel(
    W: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    sums: tl.tensor,
    gram: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride: tl.tensor,
    RUN: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """sums[piece] = ((W @ A.T) * B).sum(1), for ROWS rows, RANKS ranks and RUN columns; gram[piece] = A @ A.T of these
    columns, where RANKS holds all ranks."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    in_rows, in_ranks = row < N, rank < R
    first = tl.program_id(2) * RUN
    product = tl.zeros((ROWS, RANKS), tl.float32)
    squares = tl.zeros((RANKS, RANKS), tl.float32)
    for start in range(first, tl.minimum(first + RUN, K), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        w_place = W + row[:, None] * stride + column[None, :]
        w = tl.load(w_place, mask=in_rows[:, None] & (column < K)[None, :], other=0.0)
        a_place = A + rank[None, :] * K + column[:, None]
        a = tl.load(a_place, mask=in_ranks[None, :] & (column < K)[:, None], other=0.0)
        product = add_product(w, a, product)
        if gram is not None:  # noqa: SIM102  (known when compiled; the other when it runs)
            # Only the first row of programs computes it.
            if tl.program_id(0) == 0:
                wide = a.to(tl.float32)
                squares = tl.dot(tl.trans(wide), wide, squares, input_precision="ieee")
    if gram is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            place = tl.program_id(2).to(tl.int64) * R * R + rank[:, None] * R + rank[None, :]
            tl.store(gram + place, squares, mask=in_ranks[:, None] & in_ranks[None, :])
    b = tl.load(B + row[:, None] * R + rank[None, :], mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
    piece = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + piece.to(tl.int64) * N + row, tl.sum(product * b.to(tl.float32), axis=1), mask=in_rows)


@triton.jit
def row_cross_4bit_kernel(
    packed: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    values: tl.tensor,
    dynamic_map: tl.tensor,
    A: tl.tensor,
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
    """As `row_cross_kernel` on the packed weight, rounded to ROUNDED; A's even and odd elements are apart."""
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
        a_place = A + 2 * (rank[None, :] * row_bytes + byte[:, None])
        inside = in_ranks[None, :] & (byte < row_bytes)[:, None]
        first = round_to(tl.reshape(first, (ROWS, SPANS * SPAN // 2)), ROUNDED)
        product = add_product(first, tl.load(a_place, mask=inside, other=0.0), product)
        second = round_to(tl.reshape(second, (ROWS, SPANS * SPAN // 2)), ROUNDED)
        product = add_product(second, tl.load(a_place + 1, mask=inside, other=0.0), product)
    inside_B = (rows < N)[:, None] & in_ranks[None, :]
    b = tl.load(B + rows.to(tl.int64)[:, None] * R + rank[None, :], mask=inside_B, other=0.0)
    piece = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + piece.to(tl.int64) * N + rows, tl.sum(product * b.to(tl.float32), axis=1), mask=rows < N)


@triton.jit
def gain_kernel(
    sums: tl.tensor,
    gram: tl.tensor,
    squared: tl.tensor,
    B: tl.tensor,
    m: tl.tensor,
    gain: tl.tensor,
    scale: tl.tensor,
    N: tl.tensor,
    sum_pieces: tl.tensor,
    gram_pieces: tl.tensor,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """gain = m / sqrt(squared + 2 scale sums.sum(0) + scale^2 ((B @ gram.sum(0)) * B).sum(1)), 1 if that is 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < N
    cross = tl.zeros((ROWS,), tl.float32)
    place = row
    for _ in range(sum_pieces):
        cross += tl.load(sums + place, mask=in_rows, other=0.0)
        place += N
    update = tl.zeros((ROWS,), tl.float32)
    for first in range(0, R, RANKS):
        left = first + tl.arange(0, RANKS)
        b_left = tl.load(B + row[:, None] * R + left[None, :], mask=in_rows[:, None] & (left < R)[None, :], other=0.0)
        for second in range(0, R, RANKS):
            right = second + tl.arange(0, RANKS)
            inside = (left < R)[:, None] & (right < R)[None, :]
            between = tl.zeros((RANKS, RANKS), tl.float32)
            for piece in range(gram_pieces):
                between += tl.load(gram + piece * R * R + left[:, None] * R + right[None, :], mask=inside, other=0.0)
            b_right = tl.load(
                B + row[:, None] * R + right[None, :], mask=in_rows[:, None] & (right < R)[None, :], other=0.0
            ).to(tl.float32)
            update += tl.sum(tl.dot(b_left.to(tl.float32), between, input_precision="ieee") * b_right, axis=1)
    norm = tl.load(squared + row, mask=in_rows, other=0.0) + 2 * scale * cross + scale * scale * update
    # Rounding can give a value slightly below zero where the update cancels a row. A row of norm 0 has gain 1.
    norm = tl.sqrt_rn(tl.maximum(norm, 0.0))
    factor = tl.load(m + row, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(gain + row, tl.where(norm == 0.0, 1.0, factor / tl.where(norm == 0.0, 1.0, norm)), mask=in_rows)


def row_cross(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """sum_r (W A^T)_nr B_nr in float32: (N,)."""
    if W.numel() * len(A) == 0:
        return torch.zeros(len(W), dtype=torch.float32, device=W.device)
    return _cross(W, A.contiguous(), B.contiguous(), None).sum(0)


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """`row_cross` of the weight dequantized to ``dtype``. Its rows consist of whole blocks."""
    if weight.shape[0] * len(A) == 0:
        return torch.zeros(weight.shape[0], dtype=torch.float32, device=A.device)
    return _cross_4bit(weight, A.contiguous(), B.contiguous(), dtype).sum(0)


def adapted_gain(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    """m / ||W + scale B A|| per row."""
    if W.numel() * len(A) == 0:
        return reference.adapted_gain(W, squared, A, B, m, scale)
    A, B, R, pieces = A.contiguous(), B.contiguous(), len(A), triton.cdiv(W.shape[1], _RUN)
    gram = A.new_empty((pieces, R, R), dtype=torch.float32) if _ranks(A, W.dtype) >= R else None
    sums = _cross(W, A, B, gram)
    return _gain(sums, _gram(A) if gram is None else gram, squared, B, m, scale)


def adapted_gain_4bit(
    weight: PackedWeight, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """`adapted_gain` of W' rounded to ``dtype``."""
    if not weight.rows_are_blocks or weight.shape[0] * len(A) == 0:
        return reference.adapted_gain_4bit(weight, squared, A, B, m, scale, dtype)
    A, B = A.contiguous(), B.contiguous()
    return _gain(_cross_4bit(weight, A, B, dtype), _gram(A), squared, B, m, scale)


def _cross(W: Tensor, A: Tensor, B: Tensor, gram: Tensor | None) -> Tensor:
    """The partial sums of the programs, (pieces, N)."""
    (N, K), R, ranks = W.shape, len(A), _ranks(A, W.dtype)
    W = W if W.stride(1) == 1 else W.contiguous()
    grid = (triton.cdiv(N, _ROWS), triton.cdiv(R, ranks), triton.cdiv(K, _RUN))
    sums = W.new_empty((grid[1] * grid[2], N), dtype=torch.float32)
    with launching_on(W.device):
        row_cross_kernel[grid](
            W, A, B, sums, gram, N, K, R, W.stride(0),
            RUN=_RUN, RANKS=ranks, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
    return sums


def _cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    (N, K), R, ranks = weight.shape, len(A), min(max(power_of_two(len(A)), _FEWEST), _MOST)
    columns = min(_PACKED_COLUMNS, power_of_two(K))
    span = min(weight.block_size, columns)
    run = max(_RUN, columns) // span
    grid = (triton.cdiv(N, _PACKED_ROWS), triton.cdiv(R, ranks), triton.cdiv(K // span, run))
    sums = A.new_empty((grid[1] * grid[2], N), dtype=torch.float32)
    with launching_on(A.device):
        row_cross_4bit_kernel[grid](
            *buffers(weight), A, B, sums, N, K // span, K // 2, R,
            ROUNDED=DTYPE[dtype], BLOCK=weight.block_size, SPAN=span, SPANS=columns // span, RUN=run, RANKS=ranks,
            ROWS=_PACKED_ROWS, num_warps=_WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return sums


def _gain(sums: Tensor, gram: Tensor, squared: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    """The gain (N,) from the pieces (pieces, N) of the mixed term and the pieces (pieces, R, R) of A A^T."""
    N, R = B.shape
    gain = B.new_empty(N, dtype=torch.float32)
    with launching_on(gain.device):
        gain_kernel[(triton.cdiv(N, _GAIN_ROWS),)](
            sums, gram, squared.contiguous(), B, m.contiguous(), gain, float(scale), N, len(sums), len(gram),
            R=R, RANKS=min(max(power_of_two(R), _FEWEST), _GAIN_RANKS), ROWS=_GAIN_ROWS, num_warps=_GAIN_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return gain


def _gram(A: Tensor) -> Tensor:
    """A A^T in one piece, (1, R, R) float32."""
    return (A.float() @ A.float().T)[None]


def _ranks(A: Tensor, of_weight: torch.dtype) -> int:
    """Number of ranks at once, for a dense weight."""
    is_in_parts = A.dtype == torch.float32 and of_weight == torch.bfloat16
    return min(max(power_of_two(len(A)), _FEWEST), _MOST_IN_PARTS if is_in_parts else _MOST)
