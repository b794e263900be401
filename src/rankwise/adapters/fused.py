"""Fused projections of which only some parts adapt (loralib's ``MergedLinear(enable_lora=[True, False, True])``).

The ``out`` rows of W form ``len(parts)`` equal parts. Each of the n enabled parts has a low-rank pair of its own:
A (n r, in) and B (n out/len(parts), r) stack these pairs. This equals one LoRA of rank n r with the same A and a
block-structured B (out, n r), which is zero where a row and a column belong to different parts. PEFT's file holds that
LoRA, with lora_alpha n times as large (sqrt(n) times with rsLoRA), so that the scale is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Whether each of the equal parts is adapted. None stands for a layer that is adapted as a whole.
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
    """The inverse of ``to_blocks``, or None where an entry outside the blocks is not zero."""
    count = sum(parts)
    size, r = blocks.shape[0] // len(parts), blocks.shape[1] // count
    enabled = [part for part, on in enumerate(parts) if on]
    pieces = [
        blocks[part * size : (part + 1) * size, column * r : (column + 1) * r] for column, part in enumerate(enabled)
    ]
    B = torch.cat(pieces)
    return B if torch.equal(to_blocks(B, parts), blocks) else None
