"""Outputs of DoRA layers that need not be kept, since what follows gives them back in the backward pass.

    q' = R y        y = R^-1 q'

The gradient of a magnitude needs its layer's output y. Of q and k, attention keeps what rotary positions R made of
them: their backward pass turns that back, right before the layer's own begins. A layer that is given nothing back makes
its product again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from rankwise.compat.torch import WeakTensorKeyDictionary, viewed, writes_to

# Of each output of a layer that lives. No attribute of the tensor: that would be saved with it.
_offers: Any = WeakTensorKeyDictionary()


@dataclasses.dataclass
class Handback:
    """Between a layer and what follows it, of one output y in one forward pass."""

    # The layer does not keep y.
    is_wanted: bool
    # What follows will give y back.
    is_promised: bool = False
    _rows: Tensor | None = None

    def give(self, rows: Tensor) -> None:
        """y (T, N), in the backward pass."""
        self._rows = rows

    def take(self) -> Tensor | None:
        """y (T, N), or None where nobody gave it; once, so that it lives no longer than needed."""
        rows, self._rows = self._rows, None
        return rows


def offer(y: Tensor, handback: Handback) -> None:
    """Whoever finds y can promise to give it back."""
    _offers[y] = handback


def offered_by(y: Tensor) -> Handback | None:
    """What came with y, as long as nobody wrote to it."""
    return _offers.get(y) if writes_to(y) == 0 else None


def offered_with_heads(q: Tensor) -> Handback | None:
    """What came with y (B, L, H D), of which q (B, H, L, D) shows all, head by head."""
    y = viewed(q)
    if y is None or q.transpose(1, 2).shape[:2] != y.shape[:2] or q.numel() != y.numel():
        return None
    is_whole = q.transpose(1, 2).is_contiguous() and q.storage_offset() == y.storage_offset()
    return offered_by(y) if is_whole else None
