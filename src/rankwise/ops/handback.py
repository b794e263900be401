"""Outputs of DoRA layers that need not be kept, because a later part gives them back in the backward pass.

    q' = R y        y = R^-1 q'

The gradient of a magnitude needs its layer's output y. Attention keeps q and k after rotary positions R. The backward
pass of R rotates them back, right before the backward pass of the layer. A layer that gets nothing back computes its
product again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping

from torch import Tensor

from rankwise.compat.torch import WeakTensorKeyDictionary, viewed, writes_to

# Of each output of a layer that lives. No attribute of the tensor: that would be saved with it.
_offers: MutableMapping[Tensor, Handback] = WeakTensorKeyDictionary()


@dataclasses.dataclass
class Handback:
    """The connection between a layer and a later part, for one output y in one forward pass."""

    # The layer does not keep y.
    is_wanted: bool
    # What follows will give y back.
    is_promised: bool = False
    _rows: Tensor | None = None

    def give(self, rows: Tensor) -> None:
        """Give y (T, N) back, in the backward pass."""
        self._rows = rows

    def take(self) -> Tensor | None:
        """y (T, N), or None where no part gave it back. Only the first call returns it, so that y is released as
        early as possible.
        """
        rows, self._rows = self._rows, None
        return rows


def offer(y: Tensor, handback: Handback) -> None:
    """Attach a handback to y. A later part that finds it can promise to give y back."""
    _offers[y] = handback


def offered_by(y: Tensor) -> Handback | None:
    """The handback attached to y, unless y was written to since."""
    return _offers.get(y) if writes_to(y) == 0 else None


def offered_with_heads(q: Tensor) -> Handback | None:
    """What came with y (B, L, H D), of which q (B, H, L, D) shows all, head by head."""
    y = viewed(q)
    if y is None or q.transpose(1, 2).shape[:2] != y.shape[:2] or q.numel() != y.numel():
        return None
    is_whole = q.transpose(1, 2).is_contiguous() and q.storage_offset() == y.storage_offset()
    return offered_by(y) if is_whole else None
