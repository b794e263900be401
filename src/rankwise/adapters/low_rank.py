"""The algebra that LoRA and DoRA share, as functions of plain tensors.

Shapes: x (..., in), W (out, in), A (r, in), B (out, r), m (out,), g (out,).  Scale: s = lora_alpha / r.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rankwise.ops.card_reference import gain as gain
from rankwise.ops.card_reference import row_norms as row_norms
from rankwise.ops.elementwise import row_cross

# Number of elements of W that a norm or a merge converts to float32 at a time.
CHUNK_ELEMENTS = 1 << 24


def init_low_rank_(A: Tensor, B: Tensor, *, zero_b: bool = True) -> None:
    """``A ~ U(-1/sqrt(in), 1/sqrt(in))`` (Kaiming-uniform, a = sqrt(5)) and ``B = 0``, so that ``B A = 0``."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if zero_b:
        nn.init.zeros_(B)
    else:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))


def merged_weight(
    W: Tensor, A: Tensor, B: Tensor, s: float, m: Tensor | None = None, adapted_rows: Tensor | None = None
) -> Tensor:
    """``W + s B A``, or DoRA's ``g * (W + s B A)`` where m is given; computed in float32, returned in W's dtype.

    No argument is modified. Rows outside ``adapted_rows`` (indices) are copied bit for bit, since their computed gain
    m / ||W|| could differ from 1 by rounding.
    """
    merged = torch.empty_like(W, memory_format=torch.contiguous_format)
    A32 = A.float()
    for rows in row_chunks(W):
        dense = W[rows].float() + s * (B[rows].float() @ A32)
        if m is not None:
            dense *= gain(m[rows].float(), dense.norm(dim=1))[:, None]
        merged[rows] = dense.to(W.dtype)
    if adapted_rows is None:
        return merged
    return W.clone(memory_format=torch.contiguous_format).index_copy_(0, adapted_rows, merged[adapted_rows])


def row_norms_squared(W: Tensor) -> Tensor:
    """``||W||^2`` of each row in float32: (out,)."""
    return torch.cat([W[rows].float().square().sum(dim=1) for rows in row_chunks(W)])


def adapted_row_norms(W: Tensor, W_squared: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """``||W + s B A||`` of each row in float32, without forming the dense sum: (out,).

    The square root of ``||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>``, with inner products over the rank.
    ``W_squared`` is ``row_norms_squared(W)``, constant while the base is frozen.
    """
    return row_norms(W_squared, row_cross(W, A, B), A, B, s)


def row_chunks(W: Tensor) -> list[slice]:
    """Slices over the rows of W, each of at most CHUNK_ELEMENTS elements (but at least one row)."""
    rows = max(1, CHUNK_ELEMENTS // max(1, W.shape[1]))
    return [slice(start, start + rows) for start in range(0, W.shape[0], rows)] or [slice(0, 0)]
