"""The fused operators of a step on a GPU in plain PyTorch: the specification of `rankwise.ops.triton.card`.

Legend: T = rows, K = in features, N = out features, R = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.ops.elementwise_reference import row_cross, wide
from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.reference import dequantize_4bit, row_cross_4bit


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
    """dz = g * dy; dU <- scale dz B; dB = scale dz^T U; dm_n = sum_t dy_tn y_tn / m_n, 0 where m_n is 0.

    ``folded``: B holds g B, dU = scale dy B, and dz is not needed. Without m, dm is the sum itself.
    """
    dz = dy if g is None or folded else (wide(dy) * g).to(dy.dtype)
    dU.copy_(scale * (wide(dz) @ wide(B)))
    dB = scale * (wide(dz).T @ wide(U))
    if g is not None and folded:
        dB = dB * g[:, None]
    dm = None if y is None else (wide(dy) * wide(y)).sum(0)
    if dm is not None and m is not None:
        dm = torch.where(m == 0, 0.0, dm / torch.where(m == 0, 1.0, m))
    return dB, dm, None if dz is dy else dz


def row_norms(squared: Tensor, cross: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``||W + scale B A||`` per row from ``squared`` = ||W||^2 and ``cross`` = <W A^T, B>: float32 (N,)."""
    A32, B32 = A.float(), B.float()
    update = ((B32 @ (A32 @ A32.T)) * B32).sum(dim=1)
    # Rounding can give a value slightly below zero where the update cancels a row.
    return (squared + 2 * scale * cross + scale * scale * update).clamp_min(0).sqrt()


def gain(m: Tensor, norms: Tensor) -> Tensor:
    """``g = m / norms``, and 1 for a row of norm 0, which m cannot scale: (N,) in float32."""
    is_zero = norms == 0
    return torch.where(is_zero, 1.0, m / torch.where(is_zero, 1.0, norms))


def adapted_gain(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    """``m / ||W + scale B A||`` per row."""
    return gain(m.float(), row_norms(squared, row_cross(W, A, B), A, B, scale))


def dequantize_gained_4bit(weight: PackedWeight, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """gain * W' by rows, in ``dtype``."""
    return (gain[:, None] * dequantize_4bit(weight, torch.float32)).to(dtype)


def adapted_gain_4bit(
    weight: PackedWeight, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """`adapted_gain` of W' rounded to ``dtype``."""
    return gain(m.float(), row_norms(squared, row_cross_4bit(weight, A, B, dtype), A, B, scale))
