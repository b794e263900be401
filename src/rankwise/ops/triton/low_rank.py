"""What LoRA and DoRA add to a frozen product, in one pass over it.

Legend: T = rows, N = columns, R = rank.

The lower bound is reading and writing y, 4 T N bytes in bfloat16: 268 MB for 8192 x 8192, 80 us at an H100's 3.35 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.triton.tile import as_rows, dot_operand, is_old, launching_on, power_of_two, round_to, write_back

# (rows and columns of y per program, maximum ranks multiplied at once, warps). Without tensor cores a product takes
# more registers: twice the float32 tile spills.
_HALF, _FLOAT = (64, 128, 64, 4), (64, 64, 32, 4)
# On a T4, whose tensor cores Triton does not use: 16-bit products take even more registers than float32 ones.
_OLD = (32, 64, 32, 4)
# Minimum number of ranks for tensor cores.
_FEWEST = 16


@triton.jit
def low_rank_add_kernel(
    y: tl.tensor,
    u: tl.tensor,
    B: tl.tensor,
    g: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    y_stride: tl.tensor,
    u_stride: tl.tensor,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """y = g * (y + scale * u @ B.T) + bias, for ROWS x COLUMNS elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < T, column < N
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, R, RANKS):
        rank = start + tl.arange(0, RANKS)
        u_place = u + row[:, None] * u_stride + rank[None, :]
        B_place = B + column[None, :] * R + rank[:, None]
        u_part = tl.load(u_place, mask=in_rows[:, None] & (rank < R)[None, :], other=0.0)
        B_part = tl.load(B_place, mask=in_columns[None, :] & (rank < R)[:, None], other=0.0)
        update = tl.dot(dot_operand(u_part), dot_operand(B_part), update, input_precision="ieee")
    place = y + row[:, None] * y_stride + column[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32) + scale * update
    if g is not None:
        z = z * tl.load(g + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        z = z + tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(place, round_to(z, y.dtype.element_ty), mask=inside)


def low_rank_add_(y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None, bias: Tensor | None) -> Tensor:
    """y <- g * (y + scale * u B^T) + bias."""
    if y.numel() == 0:
        return y
    N, R = B.shape
    rows, ranks = as_rows(y), as_rows(u) if R else u
    half = _OLD if is_old(y.device) else _HALF
    row_tile, column_tile, most, warps = _FLOAT if y.dtype == torch.float32 else half
    with launching_on(y.device):
        low_rank_add_kernel[(triton.cdiv(len(rows), row_tile), triton.cdiv(N, column_tile))](
            rows,
            ranks,
            B.contiguous(),
            None if g is None else g.contiguous(),
            None if bias is None else bias.contiguous(),
            float(scale),
            len(rows),
            N,
            rows.stride(0),
            ranks.stride(0),
            R=R,
            RANKS=min(max(power_of_two(max(R, 1)), _FEWEST), most),
            ROWS=row_tile,
            COLUMNS=column_tile,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return write_back(rows, y)
