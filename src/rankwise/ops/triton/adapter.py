"""The gradients of one low-rank branch, and DoRA's norm and gain.

Legend: T = rows, K = in and N = out features, R = rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops import reference
from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.triton.tile import (
    DTYPE,
    as_rows,
    buffers,
    decode,
    dot_operand,
    is_old,
    launching_on,
    power_of_two,
    round_to,
    row_tile,
)

# Minimum number of ranks for tensor cores.
_FEWEST = 16

# The gradients, in one pass over dy: dU and dB; with a gain also dz, and dm from dy and y. A program processes a run of
# rows in a block of columns. It accumulates the block's dB, and writes the block's share of each row's dU. A second
# kernel adds the shares without atomics, in an order that depends on the shape only, so results are deterministic.
#
# The lower bound is reading dy, 2 T N bytes in bfloat16, and as much for y and dz each. The shares take 8 T R bytes for
# each block of columns and 8 N R for each run of rows, a tenth of the lower bound at R = 16.

# (rows and columns of dy that a program holds, maximum ranks at once, warps, stages). With a gain, y and dz take
# registers too; without tensor cores a product takes more.
_HALF, _GAINED, _FLOAT = (32, 256, 64, 8, 2), (32, 128, 32, 4, 2), (32, 64, 32, 4, 1)
# Maximum and minimum rows of a run, and the number of programs aimed at.
_LONGEST, _SHORTEST, _PROGRAMS = 2048, 128, 256
# Number of results of a program of the second kernel, and its warps.
_ELEMENTS, _SUM_WARPS = 512, 4


@triton.jit
def low_rank_grads_kernel(
    dy: tl.tensor,
    y: tl.tensor,
    g: tl.tensor,
    U: tl.tensor,
    B: tl.tensor,
    dz: tl.tensor,
    dU_shares: tl.tensor,
    dB_shares: tl.tensor,
    dot_shares: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    R: tl.tensor,
    dy_stride: tl.tensor,
    y_stride: tl.tensor,
    U_stride: tl.tensor,
    B_stride: tl.tensor,
    RUN: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """dz = dy * g; dU_shares[block] = dz @ B; dB_shares[run] = dz.T @ U; dot_shares[run] = (dy * y).sum(0)."""
    run, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column, rank = block * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    in_columns, in_ranks = column < N, rank < R
    B_place = B + column[:, None] * B_stride + rank[None, :]
    b = tl.load(B_place, mask=in_columns[:, None] & in_ranks[None, :], other=0.0)
    dB = tl.zeros((RANKS, COLUMNS), tl.float32)
    dot = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, RUN, ROWS):
        row = run * RUN + start + tl.arange(0, ROWS)
        in_rows = row < T
        inside = in_rows[:, None] & in_columns[None, :]
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0)
        u = tl.load(U + row[:, None] * U_stride + rank[None, :], mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
        if y is not None:
            out = tl.load(y + row[:, None] * y_stride + column[None, :], mask=inside, other=0.0)
            dot += tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=0)
        if dz is not None:
            factor = tl.load(g + column, mask=in_columns, other=0.0)
            grad = round_to(grad.to(tl.float32) * factor[None, :], dz.dtype.element_ty)
            # The programs of all ranges of ranks write the same values.
            tl.store(dz + row[:, None] * N + column[None, :], grad, mask=inside)
        share = tl.dot(dot_operand(grad), dot_operand(b), input_precision="ieee")
        dU_place = dU_shares + (block * T + row)[:, None] * R + rank[None, :]
        tl.store(dU_place, share, mask=in_rows[:, None] & in_ranks[None, :])
        dB = tl.dot(tl.trans(dot_operand(u)), dot_operand(grad), dB, input_precision="ieee")
    dB_place = dB_shares + (run * N + column)[None, :] * R + rank[:, None]
    tl.store(dB_place, dB, mask=in_ranks[:, None] & in_columns[None, :])
    if y is not None:
        tl.store(dot_shares + run * N + column, dot, mask=in_columns)


@triton.jit
def sum_shares(shares: tl.tensor, place: tl.tensor, inside: tl.tensor, count: tl.tensor, step: tl.tensor) -> tl.tensor:
    """shares[place] + shares[step + place] + ..., of ``count`` shares."""
    total = tl.load(shares + place, mask=inside, other=0.0)
    for _ in range(1, count):
        place += step
        total += tl.load(shares + place, mask=inside, other=0.0)
    return total


@triton.jit
def low_rank_sums_kernel(
    dU_shares: tl.tensor,
    dB_shares: tl.tensor,
    dot_shares: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    dU: tl.tensor,
    dB: tl.tensor,
    dm: tl.tensor,
    scale: tl.tensor,
    dU_size: tl.tensor,
    dB_size: tl.tensor,
    N: tl.tensor,
    R: tl.tensor,
    dU_stride: tl.tensor,
    blocks: tl.tensor,
    runs: tl.tensor,
    ELEMENTS: tl.constexpr,
) -> None:
    """dU = scale * dU_shares.sum(0); dB = scale * dB_shares.sum(0), times g; dm = dot_shares.sum(0) / m."""
    program, element = tl.program_id(0).to(tl.int64), tl.arange(0, ELEMENTS)
    of_dU, of_dB = tl.cdiv(dU_size, ELEMENTS), tl.cdiv(dB_size, ELEMENTS)
    if program < of_dU:
        place = program * ELEMENTS + element
        total = scale * sum_shares(dU_shares, place, place < dU_size, blocks, dU_size)
        target = dU + (place // R) * dU_stride + place % R
        tl.store(target, round_to(total, dU.dtype.element_ty), mask=place < dU_size)
    elif program < of_dU + of_dB:
        place = (program - of_dU) * ELEMENTS + element
        total = scale * sum_shares(dB_shares, place, place < dB_size, runs, dB_size)
        if g is not None:
            total *= tl.load(g + place // R, mask=place < dB_size, other=0.0)
        tl.store(dB + place, total, mask=place < dB_size)
    elif dm is not None:
        place = (program - of_dU - of_dB) * ELEMENTS + element
        total = sum_shares(dot_shares, place, place < N, runs, N)
        if m is not None:
            # dm follows from y only where m is not 0. Where m is 0, the gradient is set to 0.
            divisor = tl.load(m + place, mask=place < N, other=1.0).to(tl.float32)
            total = tl.where(divisor == 0.0, 0.0, total / tl.where(divisor == 0.0, 1.0, divisor))
        tl.store(dm + place, total, mask=place < N)


def grid(T: int, N: int, *, gained: bool) -> tuple[int, int]:
    """(number of blocks of columns of 16-bit values, number of rows of a run)."""
    return _grid(T, N, (_GAINED if gained else _HALF)[1])


def _grid(T: int, N: int, columns: int) -> tuple[int, int]:
    blocks = triton.cdiv(N, columns)
    return blocks, min(max(power_of_two(triton.cdiv(T * blocks, _PROGRAMS)), _SHORTEST), _LONGEST)


def low_rank_grads_(
    dU: Tensor,
    dy: Tensor,
    U: Tensor,
    B: Tensor,
    scale: float,
    g: Tensor | None,
    folded: bool,
    y: Tensor | None,
    m: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz = g * dy; dU <- scale dz B; dB = scale dz^T U; dm_n = sum_t dy_tn y_tn / m_n, 0 where m_n is 0."""
    (T, N), R = dy.shape, B.shape[1]
    if dy.numel() == 0 or R == 0:
        return reference.low_rank_grads_(dU, dy, U, B, scale, g, folded, y, m)
    dB = dy.new_empty((N, R), dtype=torch.float32)
    dm = None if y is None else dy.new_empty(N, dtype=torch.float32)
    dz = None if g is None or folded else dy.new_empty((T, N))
    # A T4's shared memory holds only the smaller tile.
    half = _HALF if dm is None and dz is None and not is_old(dy.device) else _GAINED
    ROWS, COLUMNS, most, warps, stages = _FLOAT if dy.dtype == torch.float32 else half
    dy, y, B, U = as_rows(dy), None if y is None else as_rows(y), as_rows(B), as_rows(U)
    blocks, run = _grid(T, N, COLUMNS)
    runs, ranks = triton.cdiv(T, run), min(max(power_of_two(R), _FEWEST), most)
    dU_shares, dB_shares, dot_shares = (
        dy.new_empty(size, dtype=torch.float32)
        for size in ((blocks, T, R), (runs, N, R), (runs if dm is not None else 0, N))
    )
    gain = None if g is None else g.contiguous()
    with launching_on(dy.device):
        low_rank_grads_kernel[(runs, blocks, triton.cdiv(R, ranks))](
            dy, y, None if dz is None else gain, U, B, dz, dU_shares, dB_shares, None if dm is None else dot_shares,
            T, N, R, dy.stride(0), 0 if y is None else y.stride(0), U.stride(0), B.stride(0),
            RUN=run, RANKS=ranks, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        counts = (T * R, N * R, 0 if dm is None else N)
        low_rank_sums_kernel[(sum(triton.cdiv(count, _ELEMENTS) for count in counts),)](
            dU_shares, dB_shares, dot_shares, gain if folded else None, None if m is None else m.contiguous(), dU, dB,
            dm, float(scale), T * R, N * R, N, R, dU.stride(0), blocks, runs,
            ELEMENTS=_ELEMENTS, num_warps=_SUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dB, dm, dz


# ``sum_r (W A^T) * B`` per row, W dense or packed: the term of DoRA's norm that reads the frozen weight; and DoRA's
# gain, which a second kernel computes from it.
#
# The sum is linear in W's columns and in the ranks: programs take pieces of both, and their results are added in an
# order that depends on the shape only. The lower bound is the traffic of the weight: 2 N K bytes in bfloat16, for 4096
# x 4096 33.6 MB and 10 us at an H100's 3.35 TB/s; 0.56 N K packed in blocks of 64.
#
# Tensor cores multiply 16-bit numbers. A in float32 is the sum of three bfloat16 numbers, exact to 24 bits, so that
# against a bfloat16 W three bfloat16 products with float32 sums equal the float32 one.

# Weight rows and columns that a program processes at once, all of its columns, and its warps.
_ROWS, _COLUMNS, _RUN, _WARPS = 64, 64, 1024, 4
# The same for a packed weight: fewer rows, because decoding takes registers.
_PACKED_ROWS, _PACKED_COLUMNS = 16, 128
# Maximum ranks at once, and that for a dense weight with A in float32, whose three parts are in registers together.
_MOST, _MOST_IN_PARTS = 64, 32
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
