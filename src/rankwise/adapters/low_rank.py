"""The algebra that LoRA and DoRA share, as functions of plain tensors.

Shapes: x (..., in), W (out, in), A (r, in), B (out, r), m (out,), g (out,).  Scale: s = lora_alpha / r.

Fused projections of which only some parts adapt (loralib's ``MergedLinear(enable_lora=[True, False, True])``): the
``out`` rows of W form ``len(parts)`` equal parts, and each of the n enabled parts has a low-rank pair of its own.
A (n r, in) and B (n out/len(parts), r) stack these pairs. This equals one LoRA of rank n r with the same A and a
block-structured B (out, n r), which is zero where a row and a column belong to different parts. PEFT's file holds that
LoRA, with lora_alpha n times as large (sqrt(n) times with rsLoRA), so that the scale is the same.

The operator of hand-written gradients (`ops.low_rank_linear`) applies to whole layers over a frozen dense, transposed
(Conv1D) or 4-bit weight, in that weight's dtype. All other cases (partly adapted fused projections, autocast to a
different dtype, compiled graphs, base weights that train) compute the same formulas with autograd, in ``lora.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.base_layer import is_own, stored_weight
from rankwise.ops.branch import Dropout, Frozen
from rankwise.ops.elementwise import row_cross
from rankwise.ops.reference import gain as gain
from rankwise.ops.reference import row_chunks
from rankwise.ops.reference import row_norms as row_norms
from rankwise.ops.selection import computes_in, is_traced
from rankwise.quantization.linear import Linear4bit, is_conv1d


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
    for rows in row_chunks(*W.shape):
        dense = W[rows].float() + s * (B[rows].float() @ A32)
        if m is not None:
            dense *= gain(m[rows].float(), dense.norm(dim=1))[:, None]
        merged[rows] = dense.to(W.dtype)
    if adapted_rows is None:
        return merged
    return W.clone(memory_format=torch.contiguous_format).index_copy_(0, adapted_rows, merged[adapted_rows])


def row_norms_squared(W: Tensor) -> Tensor:
    """``||W||^2`` of each row in float32: (out,)."""
    return torch.cat([W[rows].float().square().sum(dim=1) for rows in row_chunks(*W.shape)])


def adapted_row_norms(W: Tensor, W_squared: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """``||W + s B A||`` of each row in float32, without forming the dense sum: (out,).

    The square root of ``||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>``, with inner products over the rank.
    ``W_squared`` is ``row_norms_squared(W)``, constant while the base is frozen.
    """
    return row_norms(W_squared, row_cross(W, A, B), A, B, s)


# Whether each of the equal parts is adapted. None: the layer is adapted as a whole.
Parts = Sequence[bool]


def enabled_rows(parts: Parts, out_features: int, device: torch.device | None = None) -> Tensor:
    """The indices of the adapted rows: (n out/len(parts),)."""
    # Without a data-dependent shape, so that a model without storage can be adapted, and no GPU is waited for.
    rows = torch.arange(out_features, device=device).split(out_features // len(parts))
    return torch.cat([mine for mine, enabled in zip(rows, parts) if enabled])


def low_rank_product(x: Tensor, A: Tensor, B: Tensor, parts: Parts | None = None) -> Tensor:
    """``B A x`` in x's dtype: (..., out); with parts, ``B_i A_i x`` for every enabled part i and zero for the others.

    A and B may have a higher precision than x.
    """
    if parts is None:
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
    count = sum(parts)
    low = F.linear(x, A.to(x.dtype)).unflatten(-1, (count, -1))
    pairs = B.to(x.dtype).unflatten(0, (count, -1))
    pieces = iter(torch.einsum("...nr,nor->n...o", low, pairs))
    zero = x.new_zeros(*x.shape[:-1], pairs.shape[1])
    return torch.cat([next(pieces) if enabled else zero for enabled in parts], dim=-1)


def to_blocks(B: Tensor, parts: Parts | None) -> Tensor:
    """B (n p, r) as the block-structured matrix (len(parts) p, n r) of one LoRA of rank n r; without parts, B."""
    if parts is None:
        return B
    count = sum(parts)
    size, r = B.shape[0] // count, B.shape[1]
    blocks = B.new_zeros(len(parts) * size, count * r)
    for column, part in enumerate(index for index, enabled in enumerate(parts) if enabled):
        rows = slice(part * size, (part + 1) * size)
        blocks[rows, column * r : (column + 1) * r] = B[column * size : (column + 1) * size]
    return blocks


def from_blocks(blocks: Tensor, parts: Parts) -> Tensor | None:
    """The inverse of ``to_blocks``, or None if an entry outside the blocks is not zero."""
    count = sum(parts)
    size, r = blocks.shape[0] // len(parts), blocks.shape[1] // count
    enabled = [part for part, on in enumerate(parts) if on]
    pieces = [
        blocks[part * size : (part + 1) * size, column * r : (column + 1) * r] for column, part in enumerate(enabled)
    ]
    B = torch.cat(pieces)
    return B if torch.equal(to_blocks(B, parts), blocks) else None


SEEDS = 1 << 31


def frozen_weight(base: nn.Module, x: Tensor) -> Frozen | None:
    """The weight of ``base`` as the operator's argument, or None if the operator does not apply."""
    W = stored_weight(base)
    if is_traced() or W.requires_grad or not computes_in(x.dtype, x.device) or not is_own(base):
        return None
    if W.device != x.device:
        return None
    if type(base) is Linear4bit:
        computes_as = base.compute_dtype or x.dtype
        return Frozen(base.packed) if base.dtype is x.dtype is computes_as else None
    if W.dtype is not x.dtype:
        return None
    if type(base) is nn.Linear:
        return Frozen(W)
    return Frozen(W.T) if is_conv1d(base) else None


def drawn_dropout(p: float, training: bool) -> Dropout | None:
    """Dropout with a seed from torch's generator, so that the run's seed fixes it and a recomputation repeats it."""
    if not training or p == 0:
        return None
    return Dropout(p, int(torch.randint(SEEDS, ())))
