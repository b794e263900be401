"""Products of few rows with the packed weight: decoding, one to sixteen tokens at a time.

Legend: T = rows of x, K = in features, N = out features.

Here time is the weight's way from memory, N K / 2 bytes of codes and 4 (double-quantized: 1) bytes per block; x and y do not count.
For blocks of 64 that is 0.56 bytes per weight against 2 in bfloat16. For a layer of 4096 x 4096: 9.4 MB, 2.8 us at an H100's
3.35 TB/s and 9.4 us at an RTX 4090's 1.0 TB/s, against 10 and 33 us.

W' is rounded to the dtype of x, as everywhere, so that decoding gives the logits that training saw; sums are kept in float32.
The elements 2j and 2j + 1 of a row are multiplied apart, which spares putting them back in order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.triton.tile import INTERPRETED, Weight, launching_on, power_of_two, round_to, row_tile

FEW_ROWS = 16
"""Up to so many rows are multiplied here. It is also the least side of a tile that tensor cores take."""

# (weight rows per program, elements of a row at once, warps). One row of x: 16 bytes of codes per thread and many small programs.
# Several: the fewest weight rows that tensor cores take, for as many programs as a card has multiprocessors from N = 2048 on.
_ONE = (4, 1024, 4)
_SEVERAL = (16, 256, 4)


@triton.jit
def one_row_kernel(
    packed: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    values: tl.tensor,
    dynamic_map: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    N: tl.tensor,
    row_spans: tl.tensor,
    row_bytes: tl.tensor,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """y (N,) = w' @ x + bias, x (K,), for ROWS rows of the weight."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, SPANS, SPAN // 2), tl.float32)
    for start in range(0, row_spans, SPANS):
        spans = start + tl.arange(0, SPANS)
        first, second = row_tile(
            rows,
            spans,
            N,
            row_spans,
            packed,
            absmax,
            nested_absmax,
            offset,
            values,
            dynamic_map,
            row_bytes,
            SPAN,
            BLOCK,
        )
        first = round_to(first, x.dtype.element_ty).to(tl.float32)
        second = round_to(second, x.dtype.element_ty).to(tl.float32)
        column = (spans * SPAN)[:, None] + 2 * tl.arange(0, SPAN // 2)[None, :]
        inside = (spans < row_spans)[:, None]
        x_first = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        x_second = tl.load(x + column + 1, mask=inside, other=0.0).to(tl.float32)
        total = tl.fma(first, x_first[None, :, :], tl.fma(second, x_second[None, :, :], total))
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if bias is not None:
        result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y + rows, round_to(result, y.dtype.element_ty), mask=rows < N)


@triton.jit
def operand(part: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """``part`` rounded to DTYPE, as ``tl.dot`` takes it. The interpreter multiplies the bits of bfloat16 as integers."""
    rounded = round_to(part, DTYPE)
    if INTERPRETED:
        rounded = rounded.to(tl.float32)
    return rounded


@triton.jit
def several_rows_kernel(
    packed: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    values: tl.tensor,
    dynamic_map: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    N: tl.tensor,
    row_spans: tl.tensor,
    row_bytes: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """y (T, N) = x @ w'.T + bias, x (T, K), T <= TOKENS, for ROWS rows of the weight."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    COLUMNS: tl.constexpr = SPANS * SPAN // 2
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, row_spans, SPANS):
        first, second = row_tile(
            rows,
            start + tl.arange(0, SPANS),
            N,
            row_spans,
            packed,
            absmax,
            nested_absmax,
            offset,
            values,
            dynamic_map,
            row_bytes,
            SPAN,
            BLOCK,
        )
        first = operand(tl.reshape(first, (ROWS, COLUMNS)), x.dtype.element_ty)
        second = operand(tl.reshape(second, (ROWS, COLUMNS)), x.dtype.element_ty)
        column = start * SPAN + 2 * tl.arange(0, COLUMNS)
        inside = (column < K)[:, None] & (token < T)[None, :]
        place = x + column[:, None] + token[None, :] * K
        x_first = tl.load(place, mask=inside, other=0.0)
        x_second = tl.load(place + 1, mask=inside, other=0.0)
        if INTERPRETED:
            x_first, x_second = x_first.to(tl.float32), x_second.to(tl.float32)
        total = tl.dot(first, x_first, total, input_precision="ieee")
        total = tl.dot(second, x_second, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    place = y + token[None, :] * N + rows[:, None]
    tl.store(place, round_to(total, y.dtype.element_ty), mask=(rows < N)[:, None] & (token < T)[None, :])


def few_rows(x: Tensor, weight: Weight, N: int, bias: Tensor | None, block_size: int) -> Tensor:
    """y = x W'^T + b. x (..., K) of at most FEW_ROWS rows -> y (..., N). Rows of W' are whole blocks (`tile.rows_are_blocks`)."""
    K = x.shape[-1]
    T, y = x.numel() // K, x.new_empty((*x.shape[:-1], N))
    if y.numel() == 0:
        return y
    rows, columns, warps = _ONE if T == 1 else _SEVERAL
    columns = min(columns, power_of_two(K))
    span = min(block_size, columns)
    buffers = (*weight, x.contiguous(), None if bias is None else bias.contiguous(), y)
    tile = {"BLOCK": block_size, "SPAN": span, "SPANS": columns // span, "ROWS": rows}
    grid, counts = (triton.cdiv(N, rows),), (N, K // span, K // 2)
    with launching_on(x.device):
        if T == 1:
            one_row_kernel[grid](*buffers, *counts, **tile, num_warps=warps, enable_fp_fusion=False)
        else:
            several_rows_kernel[grid](
                *buffers, *counts, T, K, **tile, TOKENS=FEW_ROWS, num_warps=warps, enable_fp_fusion=False
            )
    return y
