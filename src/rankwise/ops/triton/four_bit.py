"""4-bit operators in Triton, with the signatures of `rankwise.ops.reference` and the same results.

Quantized and dequantized values equal the reference to the bit. Products use the same dequantized weight and sum in
float32. The callers in ``rankwise.ops.table`` have checked types, shapes and buffer sizes.

Up to 16 rows, as in generation, products read the packed weight only. With more rows, the weight is dequantized
temporarily and torch multiplies, which costs less than tensor cores that wait for decoding. The input gradient
dequantizes again, so no dense weight is kept for backward. Weights whose rows are not whole blocks are always
dequantized.

Dequantizing a weight of n elements reads n / 2 bytes of codes and 4 (double-quantized: 1) bytes a block, and writes n
elements: for bfloat16 and blocks of 64, 2.56 bytes an element. This traffic is the lower bound: 43 MB for 4096 x 4096,
13 us at an H100's 3.35 TB/s and 43 us at an RTX 4090's 1.0 TB/s. Quantizing reads n elements once and writes as much.

Legend: T = rows of x, K = in features, N = out features.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from rankwise.ops import packed_weight, reference
from rankwise.ops.packed_weight import PackedWeight, packed_shape
from rankwise.ops.reference import _TINY, dequantize_absmax, quantize_absmax
from rankwise.ops.triton import adapter
from rankwise.ops.triton.tile import (
    DTYPE,
    block_scales,
    buffers,
    decode,
    dot_operand,
    is_old,
    launching_on,
    power_of_two,
    round_to,
    row_tile,
)

TINY = tl.constexpr(_TINY)

# Elements per program and its warps. The largest block fits one program.
_CODED_ELEMENTS, _CODED_WARPS = 4096, 8


@triton.jit
def quantize_kernel(
    w: tl.tensor,
    bounds: tl.tensor,
    order: tl.tensor,
    packed: tl.tensor,
    absmax: tl.tensor,
    n: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """The codes and scales of BLOCKS blocks. A block with NaN or Inf gets a scale of NaN or Inf; the caller raises."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = (block * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = block * BLOCK < n
    part = tl.load(w + element, mask=inside[:, None], other=0.0).to(tl.float32)
    # As integers, magnitudes sort like floats and NaN comes out above Inf, which a maximum of floats would drop.
    largest = tl.max(part.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    normal = part * tl.div_rn(1.0, tl.maximum(largest, TINY))[:, None]
    below = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for i in tl.static_range(15):
        below += (normal > tl.load(bounds + i)).to(tl.int32)
    code = tl.load(order + below).to(tl.int32)
    first, second = tl.split(tl.reshape(code, (BLOCKS, BLOCK // 2, 2)))
    byte = (block * (BLOCK // 2))[:, None] + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + byte, ((first << 4) | second).to(tl.uint8), mask=inside[:, None])
    tl.store(absmax + block, largest, mask=inside)


def quantize_blocks(w: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, block_size: int) -> None:
    """Fill ``packed`` (n / 2,) and ``absmax`` (n / block,) from w (n,), contiguous, n a multiple of the block."""
    n, device = w.numel(), w.device
    if n == 0:
        return
    with launching_on(device):
        quantize_kernel[(triton.cdiv(n, _CODED_ELEMENTS),)](
            w,
            packed_weight.code_bounds(quant_type, device),
            packed_weight.code_order(quant_type, device),
            packed,
            absmax,
            n,
            BLOCK=block_size,
            BLOCKS=_CODED_ELEMENTS // block_size,
            num_warps=_CODED_WARPS,
            enable_fp_fusion=False,
        )


# Elements per program and warps: 16 bytes of codes per thread, the widest load there is.
_DENSE_ELEMENTS, _DENSE_WARPS = 4096, 4


@triton.jit
def dequantize_kernel(
    packed: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    values: tl.tensor,
    dynamic_map: tl.tensor,
    out: tl.tensor,
    gain: tl.tensor,
    n: tl.tensor,
    n_bytes: tl.tensor,
    row_blocks: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """out.view(-1)[i] = value[code_i] * absmax[i // BLOCK], for the BLOCKS blocks of one program; times the gain of its
    row, which holds ``row_blocks`` blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    start = block * BLOCK
    scale = block_scales(block, start < n, absmax, nested_absmax, offset, dynamic_map)
    if gain is not None:
        scale *= tl.load(gain + block // row_blocks, mask=start < n, other=0.0)
    byte = (block * (BLOCK // 2))[:, None] + tl.arange(0, BLOCK // 2)[None, :]
    pairs = tl.load(packed + byte, mask=byte < n_bytes, other=0)
    first, second = decode(pairs, scale[:, None], values)
    element = start[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(out + element, round_to(tl.interleave(first, second), out.dtype.element_ty), mask=element < n)


def dequantize_gained_4bit(weight: PackedWeight, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """gain * W' by rows, in ``dtype``."""
    if not weight.rows_are_blocks:
        return reference.dequantize_gained_4bit(weight, gain, dtype)
    return dequantize(weight, dtype, gain.contiguous())


def dequantize(weight: PackedWeight, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
    """W' = value[code] * absmax in ``dtype``, equal to the reference to the bit; ``gain``: of rows of whole blocks."""
    out, n = weight.codes.new_empty(weight.shape, dtype=dtype), weight.elements
    if n == 0:
        return out
    with launching_on(out.device):
        dequantize_kernel[(triton.cdiv(n, _DENSE_ELEMENTS),)](
            *buffers(weight),
            out,
            gain,
            n,
            (n + 1) // 2,
            1 if gain is None else weight.shape[1] // weight.block_size,
            BLOCK=weight.block_size,
            BLOCKS=_DENSE_ELEMENTS // weight.block_size,
            num_warps=_DENSE_WARPS,
            enable_fp_fusion=False,
        )
    return out


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


# Products of few rows with the packed weight. The lower bound is reading the weight: N K / 2 bytes of codes and 4
# (double-quantized: 1) bytes per block; x and y are negligible. In blocks of 64 that is 0.56 bytes per weight against 2
# in bfloat16. For a layer of 4096 x 4096: 9.4 MB, 2.8 us at an H100's 3.35 TB/s and 9.4 us at an RTX 4090's 1.0 TB/s,
# against 10 and 33 us.
#
# W' is rounded to the dtype of x, as in all operators, so that generation gives the logits of training; sums are
# float32. The elements 2j and 2j + 1 of a row are multiplied separately, so that they need not be interleaved again.

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
def x_tile(
    x: tl.tensor, start: tl.tensor, T: tl.tensor, K: tl.tensor, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """The elements 2j and 2j + 1 of COLUMNS columns of x, each (COLUMNS / 2, TOKENS) for ``tl.dot``; 0 outside x."""
    token, column = tl.arange(0, TOKENS), start + tl.arange(0, COLUMNS)
    inside = (token < T)[:, None] & (column < K)[None, :]
    part = dot_operand(tl.load(x + token[:, None] * K + column[None, :], mask=inside, other=0.0))
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
        first = dot_operand(round_to(tl.reshape(first, (ROWS, SPANS * SPAN // 2)), x.dtype.element_ty))
        second = dot_operand(round_to(tl.reshape(second, (ROWS, SPANS * SPAN // 2)), x.dtype.element_ty))
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


def quantize_4bit(w: Tensor, quant_type: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """w, any shape -> packed uint8 (`packed_shape`), absmax float32 (blocks,)."""
    flat, n = w.detach().contiguous().view(-1), w.numel()
    packed = w.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = w.new_empty(math.ceil(n / block_size), dtype=torch.float32)
    whole = n // block_size * block_size
    quantize_blocks(flat[:whole], packed, absmax, quant_type, block_size)
    rest = flat[whole:]
    if not (absmax[: whole // block_size].isfinite().all() and rest.isfinite().all()):
        raise reference.not_finite(w)
    if whole < n:
        # The last, partial block is divided by its absmax, not multiplied by the reciprocal; there is only one.
        codes, absmax[whole // block_size :] = reference.quantize_4bit(rest, quant_type, block_size)
        packed[whole // 2 :] = codes.view(-1)
    return packed.view(packed_shape(w.shape, block_size)), absmax


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """W' = value[code] * absmax, in ``dtype``."""
    return dequantize(weight, dtype)


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W'^T + b, with W' rounded to the dtype of x. x (..., K) -> y (..., N)."""
    if math.prod(x.shape[:-1]) <= FEW_ROWS and weight.rows_are_blocks:
        return few_rows(x, weight, bias)
    return functional.linear(x, dequantize_4bit(weight, x.dtype), bias)


def linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """dL/dx = dL/dy W'. grad (..., N) -> (..., K)."""
    return grad @ dequantize_4bit(weight, grad.dtype)


def row_norms_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """||W'_n||, float32 (N,), of W' rounded to ``dtype`` and accumulated in float32."""
    if weight.rows_are_blocks:
        return row_norms(weight, dtype)
    return torch.linalg.vector_norm(dequantize_4bit(weight, dtype), dim=1, dtype=torch.float32)


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """cross_n = <W'_n A^T, B_n>, float32 (N,), of W' rounded to ``dtype``."""
    if weight.rows_are_blocks:
        return adapter.row_cross_4bit(weight, A, B, dtype)
    return adapter.row_cross(dequantize_4bit(weight, dtype), A, B)


__all__ = [
    "dequantize_4bit",
    "dequantize_absmax",
    "linear_4bit",
    "linear_4bit_input_grad",
    "quantize_4bit",
    "quantize_absmax",
    "row_cross_4bit",
    "row_norms_4bit",
]
