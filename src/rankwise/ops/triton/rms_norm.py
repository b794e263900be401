"""RMSNorm and the gradient of its input.

Legend: T = rows, D = columns.

A program reads one row, or several narrow ones, twice: for the sum over its columns and, from the cache, for the
output. The lower bound is the memory traffic: 4 T D bytes forward and 6 T D backward in bfloat16, 8 T D with a residual
gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.triton.tile import as_rows, launching_on, power_of_two, round_to

# Elements that a program holds at a time, and its warps.
_ELEMENTS, _WARPS = 2048, 4


@triton.jit
def rows_at(
    x: tl.tensor, row: tl.tensor, column: tl.tensor, stride: tl.tensor, T: tl.tensor, D: tl.tensor
) -> tl.tensor:
    """x at these rows and columns in float32, 0 outside of T x D."""
    inside = (row < T)[:, None] & (column < D)[None, :]
    return tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def scale_at(w: tl.tensor, column: tl.tensor, D: tl.tensor, OFFSET: tl.constexpr) -> tl.tensor:
    """OFFSET + w at these columns, as one row."""
    return (OFFSET + tl.load(w + column, mask=column < D, other=0.0).to(tl.float32))[None, :]


@triton.jit
def rms_norm_kernel(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    T: tl.tensor,
    D: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """rstd = 1 / sqrt(mean(x^2) + eps), y = (OFFSET + w) * (x rstd), for ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        part = rows_at(x, row, column, x_stride, T, D)
        squares += tl.sum(part * part, axis=1)
    inverse = tl.rsqrt(squares / D + eps)
    tl.store(rstd + row, inverse, mask=row < T)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        part = rows_at(x, row, column, x_stride, T, D)
        normal = part * inverse[:, None]
        if CAST_FIRST:
            normal = round_to(normal, y.dtype.element_ty).to(tl.float32)
        out = round_to(normal * scale_at(w, column, D, OFFSET), y.dtype.element_ty)
        inside = (row < T)[:, None] & (column < D)[None, :]
        tl.store(y + row[:, None] * D + column[None, :], out, mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    w: tl.tensor,
    rstd: tl.tensor,
    residual_grad: tl.tensor,
    dx: tl.tensor,
    T: tl.tensor,
    D: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """h = dy (OFFSET + w), dx = rstd (h - x rstd^2 mean(h x)) + residual_grad, for ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inverse = tl.load(rstd + row, mask=row < T, other=0.0)
    products = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        h = rows_at(dy, row, column, dy_stride, T, D) * scale_at(w, column, D, OFFSET)
        part = rows_at(x, row, column, x_stride, T, D)
        products += tl.sum(h * part, axis=1)
    mean = inverse * inverse * (products / D)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        h = rows_at(dy, row, column, dy_stride, T, D) * scale_at(w, column, D, OFFSET)
        part = rows_at(x, row, column, x_stride, T, D)
        grad = inverse[:, None] * (h - part * mean[:, None])
        if residual_grad is not None:
            grad += rows_at(residual_grad, row, column, residual_stride, T, D)
        inside = (row < T)[:, None] & (column < D)[None, :]
        tl.store(dx + row[:, None] * D + column[None, :], round_to(grad, dx.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> tuple[Tensor, Tensor]:
    """y = (offset + w) * (x rstd), with x rstd rounded first where ``cast_first``, and rstd."""
    y = x.new_empty(x.shape)
    T, D = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    rstd = x.new_empty(T, dtype=torch.float32)
    if x.numel() == 0:
        return y, rstd
    rows, tile = as_rows(x), _tile(D)
    with launching_on(x.device):
        rms_norm_kernel[(triton.cdiv(T, tile["ROWS"]),)](
            rows, w.contiguous(), y, rstd, T, D, rows.stride(0), float(eps),
            OFFSET=offset, CAST_FIRST=cast_first, **tile, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int, residual_grad: Tensor | None
) -> Tensor:
    """dx = rstd (h - x rstd^2 mean(h x)) + residual_grad, h = dy (offset + w)."""
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx
    T, D = x.numel() // x.shape[-1], x.shape[-1]
    dys, rows, tile = as_rows(dy), as_rows(x), _tile(D)
    past = None if residual_grad is None else as_rows(residual_grad)
    with launching_on(x.device):
        rms_norm_backward_kernel[(triton.cdiv(T, tile["ROWS"]),)](
            dys, rows, w.contiguous(), rstd.contiguous(), past, dx, T, D,
            dys.stride(0), rows.stride(0), 0 if past is None else past.stride(0),
            OFFSET=offset, **tile, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dx


def _tile(D: int) -> dict[str, int]:
    columns = min(power_of_two(D), _ELEMENTS)
    return {"ROWS": _ELEMENTS // columns, "COLUMNS": columns}
