"""The gradients of one low-rank branch, in one pass over dy: dU and dB; with a gain also dz, and dm from dy and y.

A program processes a run of rows in a block of columns. It accumulates the block's dB, and writes the block's share of
each row's dU. A second kernel adds the shares without atomics, in an order that depends on the shape only, so results
are deterministic.

Legend: T = rows, N = columns, R = rank.

The lower bound is reading dy, 2 T N bytes in bfloat16, and as much for y and dz each. The shares take 8 T R bytes for
each block of columns and 8 N R for each run of rows, a tenth of the lower bound at R = 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops import reference
from rankwise.ops.triton.tile import as_rows, dot_operand, is_old, launching_on, power_of_two, round_to

# (rows and columns of dy that a program holds, maximum ranks at once, warps, stages). With a gain, y and dz take
# registers too; without tensor cores a product takes more.
_HALF, _GAINED, _FLOAT = (32, 256, 64, 8, 2), (32, 128, 32, 4, 2), (32, 64, 32, 4, 1)
# Minimum number of ranks for tensor cores.
_FEWEST = 16
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
