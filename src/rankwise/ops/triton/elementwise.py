"""What a training step fuses on Triton beside products, with the signatures of `rankwise.ops.reference`.

float32, bfloat16 and float16. The callers in ``rankwise.ops.table`` have checked types and shapes. The lower bound of
each kernel is its memory traffic. Sums over rows take two stages without atomics, in an order that depends on the shape
only, so results are deterministic.

Legend: T = rows, N and D = columns, R = rank; B, H, L = batch, heads, positions.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.reference import dropout_keys, dropout_threshold
from rankwise.ops.triton.adapter import adapted_gain, adapted_gain_4bit, low_rank_grads_, row_cross
from rankwise.ops.triton.cross_entropy import cross_entropy_
from rankwise.ops.triton.four_bit import dequantize_gained_4bit
from rankwise.ops.triton.tile import as_rows, dot_operand, is_old, launching_on, power_of_two, round_to, write_back

__all__ = [
    "adapted_gain",
    "adapted_gain_4bit",
    "cross_entropy_",
    "dequantize_gained_4bit",
    "dropout",
    "dropout_add_",
    "glu",
    "glu_backward",
    "low_rank_add_",
    "low_rank_grads_",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_",
    "row_cross",
    "scaled_grad",
]

_WARPS = 4

# RMSNorm and the gradient of its input: in bfloat16 4 T D bytes forward, and 6 T D backward, 8 T D with a residual
# gradient. A program reads one row, or several narrow ones, twice: for the sum over its columns and, from the cache,
# for the output.

# Elements that a program holds at a time.
_NORM_ELEMENTS = 2048


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
    columns = min(power_of_two(D), _NORM_ELEMENTS)
    return {"ROWS": _NORM_ELEMENTS // columns, "COLUMNS": columns}


# Gated activations and their gradients: 6 T N bytes forward and 10 T N backward in bfloat16, 12 with the product, which
# the next layer's backward pass may need. Nothing is overwritten, because other functions may have saved gate and up.

# Columns of a row per program: 16 bytes per thread and tensor, the widest load there is.
_GLU_COLUMNS = 1024

ROOT_HALF = tl.constexpr(math.sqrt(0.5))
ROOT_2_PI = tl.constexpr(math.sqrt(2 * math.pi))
STEEPNESS = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


@triton.jit
def activated(x: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """act(x) and act'(x), float32. gelu_tanh: 0.5 (1 + tanh(a / 2)) = sigmoid(a)."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        slope = s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu_tanh":
        # Past 1e4 the sigmoid is 0 or 1, and the factor must not become infinite.
        square = tl.minimum(x * x, 1e4)
        s = tl.sigmoid(x * STEEPNESS * (1.0 + square * CUBIC))
        slope = s + x * s * (1.0 - s) * STEEPNESS * (1.0 + square * CUBIC * 3.0)
    else:
        s = 0.5 * (1.0 + tl.erf(x * ROOT_HALF))
        slope = s + x * tl.exp(-0.5 * x * x) / ROOT_2_PI
    return x * s, slope


@triton.jit
def glu_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    ACT: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out = act(gate) * up, for COLUMNS elements of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    a, _ = activated(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32), ACT)
    b = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + column, round_to(a * b, out.dtype.element_ty), mask=inside)


@triton.jit
def glu_backward_kernel(
    dout: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    product: tl.tensor,
    N: tl.tensor,
    dout_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    ACT: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """d_gate = dout * up * act'(gate), d_up = dout * act(gate) and product = act(gate) * up, as `glu_kernel`."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    a, slope = activated(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32), ACT)
    b = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dout + row * dout_stride + column, mask=inside, other=0.0).to(tl.float32)
    place = row * N + column
    tl.store(d_gate + place, round_to(d * b * slope, d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + place, round_to(d * a, d_up.dtype.element_ty), mask=inside)
    if product is not None:
        tl.store(product + place, round_to(a * b, product.dtype.element_ty), mask=inside)


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up."""
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    gates, ups = as_rows(gate), as_rows(up)
    T, N = gates.shape
    with launching_on(gate.device):
        glu_kernel[(T, triton.cdiv(N, _GLU_COLUMNS))](
            gates, ups, out, N, gates.stride(0), ups.stride(0),
            ACT=act, COLUMNS=_GLU_COLUMNS, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, with_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dgate = dout up act'(gate); dup = dout act(gate); product = act(gate) up."""
    d_gate, d_up = (gate.new_empty(gate.shape) for _ in range(2))
    product = gate.new_empty(gate.shape) if with_product else None
    if gate.numel() == 0:
        return d_gate, d_up, product
    douts, gates, ups = as_rows(dout), as_rows(gate), as_rows(up)
    T, N = gates.shape
    with launching_on(gate.device):
        glu_backward_kernel[(T, triton.cdiv(N, _GLU_COLUMNS))](
            douts, gates, ups, d_gate, d_up, product, N, douts.stride(0), gates.stride(0), ups.stride(0),
            ACT=act, COLUMNS=_GLU_COLUMNS, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return d_gate, d_up, product


# Rotary positions, and their transposed map, the gradient: 4 B H L D bytes in bfloat16, without cos and sin, which are
# small. Of the D columns of a head the first D' turn.

# Elements of each half that a program holds at a time.
_ROPE_ELEMENTS = 1024


@triton.jit
def rope_kernel(
    q: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    H: tl.tensor,
    L: tl.tensor,
    half: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_position: tl.tensor,
    q_column: tl.tensor,
    out_batch: tl.tensor,
    out_head: tl.tensor,
    out_position: tl.tensor,
    out_column: tl.tensor,
    angle_batch: tl.tensor,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Both halves of HEADS heads at one position; ``half`` = D' / 2, ``angle_batch`` 0 where all rows share angles."""
    batch, position = tl.program_id(0).to(tl.int64) // L, tl.program_id(0).to(tl.int64) % L
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    turns, inside = column < half, (head < H)[:, None] & (column < half)[None, :]
    angle = batch * angle_batch + position * 2 * half + column
    cos_1 = tl.load(cos + angle, mask=turns, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + half, mask=turns, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + angle + half, mask=turns, other=0.0).to(tl.float32)
    place = q + batch * q_batch + position * q_position + head[:, None] * q_head + column[None, :] * q_column
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half * q_column, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        turned_1 = first * cos_1[None, :] + second * sin_2[None, :]
        turned_2 = second * cos_2[None, :] - first * sin_1[None, :]
    else:
        turned_1 = first * cos_1[None, :] - second * sin_1[None, :]
        turned_2 = second * cos_2[None, :] + first * sin_2[None, :]
    place = out + batch * out_batch + position * out_position + head[:, None] * out_head + column[None, :] * out_column
    tl.store(place, round_to(turned_1, out.dtype.element_ty), mask=inside)
    tl.store(place + half * out_column, round_to(turned_2, out.dtype.element_ty), mask=inside)


def rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """(q_1 cos_1 - q_2 sin_1, q_2 cos_2 + q_1 sin_2) of the halves of the first D' columns; the others stay."""
    B, H, L, D = q.shape
    out = q.new_empty((B, L, H, D)).transpose(1, 2)
    if cos.shape[-1] < D:
        return rope_(out.copy_(q), cos, sin, inverse)
    return _turn(q, cos, sin, out, inverse)


def rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`rope` in place."""
    # Memory that overlaps itself gets PyTorch's own error from copy_.
    return q.copy_(rope(q, cos, sin, inverse)) if 0 in q.stride() else _turn(q, cos, sin, q, inverse)


def _turn(q: Tensor, cos: Tensor, sin: Tensor, out: Tensor, inverse: bool) -> Tensor:
    B, H, L, _ = q.shape
    half = cos.shape[-1] // 2
    if q.numel() == 0 or half == 0:
        return out
    cos, sin = cos.contiguous(), sin.contiguous()
    columns = power_of_two(half)
    heads = min(power_of_two(H), max(1, _ROPE_ELEMENTS // columns))
    with launching_on(q.device):
        rope_kernel[(B * L, triton.cdiv(H, heads))](
            q, cos, sin, out, H, L, half, *q.stride(), *out.stride(), cos.stride(0) if cos.shape[0] > 1 else 0,
            INVERSE=inverse, HEADS=heads, HALF=columns, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


# Dropout whose mask is a hash of the seed and the flat index, that of `rankwise.ops.reference` to the bit. The words of
# a key are passed as signed 32-bit numbers without specialization, so that a new seed does not cause a compilation.

# Elements per program, a divisor of 2^32.
_DROPPED_ELEMENTS = 2048


@triton.jit
def keep_mask(
    start: tl.tensor, before: tl.tensor, middle: tl.tensor, threshold: tl.tensor, ELEMENTS: tl.constexpr
) -> tl.tensor:
    """Which of the ELEMENTS elements from ``start``, a multiple of ELEMENTS, are kept."""
    # All these elements have one upper word of the index, which changes the keys from element 2^32 on.
    upper = (start >> 32).to(tl.uint32) * 0x9E3779B9
    index = start.to(tl.uint32) + tl.arange(0, ELEMENTS).to(tl.uint32)
    h = index + (before.to(tl.uint32) + upper)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) ^ (middle.to(tl.uint32) + upper)
    h = h * 0x846CA68B
    return (h ^ (h >> 16)) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["before", "middle", "threshold"])
def dropout_kernel(
    x: tl.tensor,
    y: tl.tensor,
    factor: tl.tensor,
    before: tl.tensor,
    middle: tl.tensor,
    threshold: tl.tensor,
    n: tl.tensor,
    ELEMENTS: tl.constexpr,
) -> None:
    """y = x * mask * factor."""
    start = tl.program_id(0).to(tl.int64) * ELEMENTS
    element = start + tl.arange(0, ELEMENTS)
    part = tl.load(x + element, mask=element < n, other=0.0).to(tl.float32)
    keep = keep_mask(start, before, middle, threshold, ELEMENTS)
    tl.store(y + element, round_to(tl.where(keep, part * factor, 0.0), y.dtype.element_ty), mask=element < n)


@triton.jit(do_not_specialize=["before", "middle", "threshold"])
def dropout_add_kernel(
    dx: tl.tensor,
    z: tl.tensor,
    factor: tl.tensor,
    before: tl.tensor,
    middle: tl.tensor,
    threshold: tl.tensor,
    n: tl.tensor,
    ELEMENTS: tl.constexpr,
) -> None:
    """dx = dx + z * mask * factor."""
    start = tl.program_id(0).to(tl.int64) * ELEMENTS
    element = start + tl.arange(0, ELEMENTS)
    part = tl.load(z + element, mask=element < n, other=0.0).to(tl.float32)
    total = tl.load(dx + element, mask=element < n, other=0.0).to(tl.float32)
    keep = keep_mask(start, before, middle, threshold, ELEMENTS)
    total = tl.where(keep, total + part * factor, total)
    tl.store(dx + element, round_to(total, dx.dtype.element_ty), mask=element < n)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """y_i = x_i / (1 - p) where the mask keeps it, else 0; i is the flat index of a contiguous x."""
    y = x.new_empty(x.shape)
    _launch(dropout_kernel, x.contiguous(), y, p, dropout_keys(seed))
    return y


def dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> Tensor:
    """dx_i <- dx_i + z_i / (1 - p) where the mask keeps z_i."""
    out = dx.contiguous()
    _launch(dropout_add_kernel, out, z.contiguous(), p, dropout_keys(seed))
    return dx if out is dx else dx.copy_(out)


def _launch(kernel: triton.JITFunction, first: Tensor, second: Tensor, p: float, keys: tuple[int, int]) -> None:
    """Both contiguous and of one size. Sums are not fused: the results are those of the reference to the bit."""
    n = first.numel()
    if n == 0:
        return
    words = [_signed(word) for word in (*keys, dropout_threshold(p))]
    with launching_on(first.device):
        kernel[(triton.cdiv(n, _DROPPED_ELEMENTS),)](
            first, second, 1 / (1 - p), *words, n, ELEMENTS=_DROPPED_ELEMENTS, num_warps=_WARPS, enable_fp_fusion=False
        )


def _signed(word: int) -> int:
    """The signed 32-bit number with the bits of ``word``."""
    return word - (word >> 31 << 32)


# The gradient through DoRA's gain, and of its magnitude, in one pass over dy and y.

# Rows and columns that a program processes at once, and all of its rows.
_ROWS, _COLUMNS, _RUN = 16, 128, 256


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


# What LoRA and DoRA add to a frozen product, in one pass over it: 4 T N bytes in bfloat16, 268 MB for 8192 x 8192, 80
# us at an H100's 3.35 TB/s.

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
