"""Rotary positions, and their transposed map, the gradient.

Legend: B, H, L = batch, heads, positions; D = columns of a head, of which the first D' turn.

The lower bound is the memory traffic: 4 B H L D bytes in bfloat16, without cos and sin, which are small.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.triton.tile import launching_on, power_of_two, round_to

# Elements of each half that a program holds at a time, and its warps.
_ELEMENTS, _WARPS = 1024, 4


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
    heads = min(power_of_two(H), max(1, _ELEMENTS // columns))
    with launching_on(q.device):
        rope_kernel[(B * L, triton.cdiv(H, heads))](
            q, cos, sin, out, H, L, half, *q.stride(), *out.stride(), cos.stride(0) if cos.shape[0] > 1 else 0,
            INVERSE=inverse, HEADS=heads, HALF=columns, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out
