"""Products of few rows with the packed weight, as in generation: one to sixteen tokens at a time.

Legend: T = rows of x, K = in features, N = out features.

The lower bound is reading the weight: N K / 2 bytes of codes and 4 (double-quantized: 1) bytes per block; x and y are
negligible. In blocks of 64 that is 0.56 bytes per weight against 2 in bfloat16. For a layer of 4096 x 4096: 9.4 MB,
2.8 us at an H100's 3.35 TB/s and 9.4 us at an RTX 4090's 1.0 TB/s, against 10 and 33 us.

W' is rounded to the dtype of x, as in all operators, so that generation gives the logits of training; sums are float32.
The elements 2j and 2j + 1 of a row are multiplied separately, so that they need not be interleaved again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.triton.tile import (
    INTERPRETED,
    buffers,
    decode,
    is_old,
    launching_on,
    power_of_two,
    round_to,
    row_tile,
)

# Maximum number of rows of x. It is also the minimum size of a tensor core's tile.
FEW_ROWS = 16

# (weight rows per program, elements of a row at once, warps): 16 bytes of codes per thread, the widest load there is.
# Several rows of x: the fewest weight rows that tensor cores take, for many programs; 512 columns spill registers.
# Compiled in one stage: Triton's pipeliner would also move the look-ups of the 16 values through shared memory.
_ONE = (4, 1024, 4)
_SEVERAL = (16, 256, 4)
# On a T4, whose tensor cores Triton does not use, 256 columns spill registers, too.
_SEVERAL_OLD = (16, 64, 4)


@triton.jit
def x_halves(x: tl.tensor, spans: tl.tensor, row_spans: tl.tensor, SPAN: tl.constexpr) -> tl.tensor:
    """The elements 2j and 2j + 1 of the spans of x, float32 (S, HALF); 0 beyond its end."""
    inside = (spans < row_spans)[:, None]
    column = (spans * SPAN)[:, None] + 2 * tl.arange(0, SPAN // 2)[None, :]
    first = tl.load(x + column, mask=inside, other=0.0)
    second = tl.load(x + column + 1, mask=inside, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


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
    rows, spans = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SPANS)
    total = tl.zeros((ROWS, SPANS, SPAN // 2), tl.float32)
    pairs, scale = row_tile(
        rows, spans, N, row_spans, row_bytes, packed, absmax, nested_absmax, offset, dynamic_map, SPAN, BLOCK
    )
    for _ in range(0, row_spans, SPANS):
        first, second = decode(pairs, scale, values)
        first = round_to(first, x.dtype.element_ty).to(tl.float32)
        second = round_to(second, x.dtype.element_ty).to(tl.float32)
        x_first, x_second = x_halves(x, spans, row_spans, SPAN)
        # The next tile is loaded while this one is multiplied.
        spans += SPANS
        pairs, scale = row_tile(
            rows, spans, N, row_spans, row_bytes, packed, absmax, nested_absmax, offset, dynamic_map, SPAN, BLOCK
        )
        total = tl.fma(first, x_first[None, :, :], tl.fma(second, x_second[None, :, :], total))
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if bias is not None:
        result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y + rows, round_to(result, y.dtype.element_ty), mask=rows < N)


@triton.jit
def operand(part: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """``part`` rounded to dtype, as ``tl.dot`` takes it. The interpreter multiplies bfloat16 as integers."""
    rounded = round_to(part, dtype)
    if INTERPRETED:
        rounded = rounded.to(tl.float32)
    return rounded


@triton.jit
def x_tile(
    x: tl.tensor, start: tl.tensor, T: tl.tensor, K: tl.tensor, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """The elements 2j and 2j + 1 of COLUMNS columns of x, each (COLUMNS / 2, TOKENS) for ``tl.dot``; 0 outside x."""
    token, column = tl.arange(0, TOKENS), start + tl.arange(0, COLUMNS)
    inside = (token < T)[:, None] & (column < K)[None, :]
    part = tl.load(x + token[:, None] * K + column[None, :], mask=inside, other=0.0)
    if INTERPRETED:
        part = part.to(tl.float32)
    first, second = tl.split(tl.reshape(part, (TOKENS, COLUMNS // 2, 2)))
    return tl.trans(first), tl.trans(second)


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
    rows, spans = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SPANS)
    token = tl.arange(0, TOKENS)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    pairs, scale = row_tile(
        rows, spans, N, row_spans, row_bytes, packed, absmax, nested_absmax, offset, dynamic_map, SPAN, BLOCK
    )
    for start in range(0, row_spans, SPANS):
        first, second = decode(pairs, scale, values)
        first = operand(tl.reshape(first, (ROWS, SPANS * SPAN // 2)), x.dtype.element_ty)
        second = operand(tl.reshape(second, (ROWS, SPANS * SPAN // 2)), x.dtype.element_ty)
        x_first, x_second = x_tile(x, start * SPAN, T, K, TOKENS, SPANS * SPAN)
        spans += SPANS
        pairs, scale = row_tile(
            rows, spans, N, row_spans, row_bytes, packed, absmax, nested_absmax, offset, dynamic_map, SPAN, BLOCK
        )
        total = tl.dot(first, x_first, total, input_precision="ieee")
        total = tl.dot(second, x_second, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    place = y + token[None, :] * N + rows[:, None]
    tl.store(place, round_to(total, y.dtype.element_ty), mask=(rows < N)[:, None] & (token < T)[None, :])


def few_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """y = x W'^T + b. x (..., K) of at most FEW_ROWS rows -> y (..., N). Rows of W' consist of whole blocks."""
    N, K = weight.shape
    T, y = x.numel() // K, x.new_empty((*x.shape[:-1], N))
    if y.numel() == 0:
        return y
    rows, columns, warps = _ONE if T == 1 else _SEVERAL_OLD if is_old(x.device) else _SEVERAL
    columns = min(columns, power_of_two(K))
    span = min(weight.block_size, columns)
    inputs = (*buffers(weight), x.contiguous(), None if bias is None else bias.contiguous(), y)
    tile = {"BLOCK": weight.block_size, "SPAN": span, "SPANS": columns // span, "ROWS": rows}
    grid, counts = (triton.cdiv(N, rows),), (N, K // span, K // 2)
    with launching_on(x.device):
        if T == 1:
            one_row_kernel[grid](*inputs, *counts, **tile, num_warps=warps, num_stages=1, enable_fp_fusion=False)
        else:
            several_rows_kernel[grid](
                *inputs, *counts, T, K, **tile, TOKENS=FEW_ROWS, num_warps=warps, num_stages=1, enable_fp_fusion=False
            )
    return y
