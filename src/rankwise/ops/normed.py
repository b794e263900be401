"""What a low-rank branch saves of its input for the backward pass: x, or the tensors from which an RMSNorm made x.

    x = (h rstd) * w        dA = dU^T x = ((rstd * dU)^T h) * w

A norm saves h and rstd for its own gradient. A branch that reads x saves the same two, and computes dA from h with
scaled rows of dU and scaled columns of dA, so that x is neither saved nor recomputed.

Legend: T = rows of x, K = columns, R = ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from rankwise.compat.torch import WeakTensorKeyDictionary, writes_to
from rankwise.ops import elementwise

# {living output of a norm: the tensors from which it was made}. An attribute of the tensor would be saved with it.
_made: MutableMapping[Tensor, tuple[Normed, int]] = WeakTensorKeyDictionary()

# ``dU^T rows``: dU (T, R), rows (T, K) -> (R, K).
OfRows = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Plain:
    """x (..., K) itself."""

    x: Tensor

    def rows(self) -> Tensor:
        """x (T, K)."""
        return _rows(self.x)

    def grad_A(self, dU: Tensor, product: OfRows) -> Tensor:
        """``dU^T x`` (R, K)."""
        return product(dU, _rows(self.x))


@dataclasses.dataclass(frozen=True)
class Normed:
    """The output x of a norm, (h rstd) * (offset + w): h (..., K), w (K,), which is frozen, rstd (T,) in float32."""

    h: Tensor
    w: Tensor
    rstd: Tensor
    eps: float
    offset: int
    cast_first: bool

    def rows(self) -> Tensor:
        """x (T, K), recomputed."""
        return elementwise.rms_norm(_rows(self.h), self.w, self.eps, self.offset, self.cast_first)[0]

    def grad_A(self, dU: Tensor, product: OfRows) -> Tensor:
        """``dU^T x`` (R, K)."""
        scaled = torch.mul(dU, self.rstd.unsqueeze(1), out=torch.empty_like(dU))
        return product(scaled, _rows(self.h)) * (self.w if self.offset == 0 else self.offset + self.w.float())


Source = Plain | Normed


def remember(x: Tensor, normed: Normed) -> None:
    """Record that x is the output of ``normed``. Not in float16, where rstd * dU may overflow."""
    if x.dtype is not torch.float16:
        _made[x] = normed, writes_to(x)


def source_of(x: Tensor) -> Source:
    """What to save of x: its norm's tensors, or x itself if it is no norm's output or was written to since."""
    normed, version = _made.get(x, (None, 0))
    return Plain(x) if normed is None or writes_to(x) != version else normed


def tensors_of(source: Source) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tensors to hand to ``save_for_backward``: (x, None, None) or (h, w, rstd). `with_tensors` puts them back."""
    return (source.x, None, None) if isinstance(source, Plain) else (source.h, source.w, source.rstd)


def without_tensors(source: Source) -> Source:
    """The source without its tensors, which ``save_for_backward`` keeps instead, so that autograd notices changes."""
    gone: Any = None
    if isinstance(source, Plain):
        return Plain(gone)
    return dataclasses.replace(source, h=gone, w=gone, rstd=gone)


def with_tensors(source: Source, x_or_h: Tensor, w: Tensor, rstd: Tensor) -> Source:
    if isinstance(source, Plain):
        return Plain(x_or_h)
    return dataclasses.replace(source, h=x_or_h, w=w, rstd=rstd)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
