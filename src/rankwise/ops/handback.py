"""Outputs of DoRA layers that need not be saved, because a later operation returns them in the backward pass.

    q' = R y        y = R^-1 q'

The gradient of a magnitude needs its layer's output y. Attention saves q and k after rotary positions R. The backward
pass of R rotates them back, right before the backward pass of the layer. A layer whose output is not returned
recomputes its product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping

from torch import Tensor

from rankwise.compat.torch import WeakTensorKeyDictionary, viewed, writes_to

# {living output of a layer: its handback}. An attribute of the tensor would be saved with it.
_offers: MutableMapping[Tensor, Handback] = WeakTensorKeyDictionary()


@dataclasses.dataclass
class Handback:
    """The connection between a layer and a later operation, for one output y in one forward pass."""

    # Whether the layer does not save y.
    is_wanted: bool
    # Whether the later operation will return y.
    is_promised: bool = False
    _rows: Tensor | None = None

    def give(self, rows: Tensor) -> None:
        """Return y (T, N) to the layer, in the backward pass."""
        self._rows = rows

    def take(self) -> Tensor | None:
        """y (T, N), or None where it was not returned. Only the first call gives it, so that y is freed early."""
        rows, self._rows = self._rows, None
        return rows


def offer(y: Tensor, handback: Handback) -> None:
    """Attach a handback to y. A later operation that finds it can promise to return y."""
    _offers[y] = handback


def offered_by(y: Tensor) -> Handback | None:
    """The handback attached to y, unless y was written to since."""
    return _offers.get(y) if writes_to(y) == 0 else None


def offered_with_heads(q: Tensor) -> Handback | None:
    """The handback of y (B, L, H D), if q (B, H, L, D) is a view of all of y, head by head; else None."""
    y = viewed(q)
    if y is None or q.transpose(1, 2).shape[:2] != y.shape[:2] or q.numel() != y.numel():
        return None
    is_whole = q.transpose(1, 2).is_contiguous() and q.storage_offset() == y.storage_offset()
    return offered_by(y) if is_whole else None
