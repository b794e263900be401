"""The gradient through DoRA's gain, and of its magnitude, in one pass over dy and y.

Sums take two stages without atomics, within a run of rows and over the runs, in an order that depends on the shape
only, so results are deterministic.

Legend: T = rows, N = columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.triton.tile import as_rows, launching_on, round_to

# Rows and columns that a program processes at once, all of its rows, and its warps.
_ROWS, _COLUMNS, _RUN, _WARPS = 16, 128, 256, 4


@triton.jit
def scaled_grad_kernel(
    dy: tl.tensor,
    y: tl.tensor,
    g: tl.tensor,
    dz: tl.tensor,
    sums: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    dy_stride: tl.tensor,
    y_stride: tl.tensor,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """dz = dy * g and sums[run] = (dy * y).sum(0), for RUN rows and COLUMNS columns."""
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < N
    factor = tl.load(g + column, mask=in_columns, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, RUN, ROWS):
        row = run * RUN + start + tl.arange(0, ROWS)
        inside = (row < T)[:, None] & in_columns[None, :]
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dz + row[:, None] * N + column[None, :], round_to(grad * factor, dz.dtype.element_ty), mask=inside)
        if y is not None:
            out = tl.load(y + row[:, None] * y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            total += grad * out
    if y is not None:
        tl.store(sums + run * N + column, tl.sum(total, axis=0), mask=in_columns)


def scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """dz = dy * g; dot_n = sum_t dy_tn y_tn."""
    dz, N = dy.new_empty(dy.shape), dy.shape[-1]
    if dy.numel() == 0:
        return dz, None if y is None else torch.zeros(N, dtype=torch.float32, device=dy.device)
    grads, outputs = as_rows(dy), None if y is None else as_rows(y)
    T = len(grads)
    runs = triton.cdiv(T, _RUN)
    sums = None if y is None else dy.new_empty((runs, N), dtype=torch.float32)
    with launching_on(dy.device):
        scaled_grad_kernel[(runs, triton.cdiv(N, _COLUMNS))](
            grads,
            outputs,
            g.contiguous(),
            dz,
            sums,
            T,
            N,
            grads.stride(0),
            0 if outputs is None else outputs.stride(0),
            RUN=_RUN,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return dz, None if sums is None else sums.sum(0)
