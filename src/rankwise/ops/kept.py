"""Values that are kept: until the parameters from which they are computed change (DoRA's norms, copies of A and B:
`rankwise.ops.rounded`), and from the forward to the backward pass.

A tensor's version counter counts PyTorch's in-place operations, and a replaced tensor has a different storage. Two
kinds of writers bypass both. Optimizers with their own kernels (fused AdamW, bitsandbytes) are caught by the hook on
every optimizer's step. Code that writes through ``parameter.data`` is caught on a CPU by comparing with a copy of the
parameters (of rank size); on an accelerator the comparison would force a synchronisation, so such a write is noticed
at the next optimizer step only. A write to a frozen base through ``.data`` is not noticed.

Legend: T = rows, K = in and N = out features, r = rank, R = the ranks of all branches together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from rankwise.compat.torch import StorageWeakRef, WeakTensorKeyDictionary, is_fake, viewed, writes_to
from rankwise.ops import elementwise
from rankwise.ops.selection import is_traced, transforms_functions

Key = tuple[object, ...]

_steps_taken = 0


class Kept:
    """One value, kept while the ``trained`` tensors and the key of the frozen ones stay unchanged."""

    def __init__(self) -> None:
        self._key: Key | None = None
        self._copies: list[Tensor] = []
        self._value: Tensor | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        # A copied module has other parameters, here or in another process, so its cache starts empty.
        return Kept, ()

    def get(self, trained: tuple[Tensor, ...], frozen: Key) -> Tensor | None:
        """The value, or None if it is out of date or was never set."""
        if self._value is None or not _trackable(trained) or self._key != _key(trained, frozen):
            return None
        same = all(torch.equal(copy, tensor) for copy, tensor in zip(self._copies, filter(is_comparable, trained)))
        return self._value if same else None

    def keep(self, trained: tuple[Tensor, ...], frozen: Key, value: Tensor) -> Tensor:
        if _trackable((*trained, value)):
            self._key, self._value = _key(trained, frozen), value
            self._copies = [tensor.detach().clone() for tensor in trained if is_comparable(tensor)]
        return value

    def tensors(self) -> list[Tensor]:
        """All tensors that this holds: the copies for comparison and the value."""
        return self._copies if self._value is None else [*self._copies, self._value]


def trained_key(tensor: Tensor) -> Key | None:
    """A key that changes with every write to a trained tensor, or None if writes cannot be detected."""
    return _key((tensor,), ()) if _trackable((tensor,)) else None


def frozen_key(tensor: Tensor) -> Key:
    """(id of the tensor, weak reference to its storage, version counter)."""
    if transforms_functions():
        # Tensors wrapped by torch.func have no storage, and nothing is cached for them.
        return id(tensor), 0, 0
    # The weak reference lets the memory be freed, and keeps the address from being reused by a later storage.
    return id(tensor), StorageWeakRef(tensor.untyped_storage()), writes_to(tensor)


def _key(trained: tuple[Tensor, ...], frozen: Key) -> Key:
    _count_optimizer_steps()
    return (*frozen, _steps_taken if trained else 0, *(frozen_key(tensor) for tensor in trained))


def _trackable(tensors: tuple[Tensor, ...]) -> bool:
    # Tensors made under inference_mode have no version; compiled graphs and torch.func compute the value themselves.
    return not is_traced() and not any(tensor.is_inference() for tensor in tensors)


def is_comparable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not is_fake(tensor)


@functools.cache
def _count_optimizer_steps() -> None:
    register_optimizer_step_post_hook(_count)


def _count(*_: object) -> None:
    global _steps_taken
    _steps_taken += 1


# What adapted layers need not save for the backward pass, because a neighbour saves or returns it. First the outputs of
# DoRA layers, which are returned by a later operation:
#
#     q' = R y        y = R^-1 q'
#
# The gradient of a magnitude needs its layer's output y. Attention saves q and k after rotary positions R. The backward
# pass of R rotates them back, right before the backward pass of the layer. A layer whose output is not returned
# recomputes its product.

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
        """y (T, N), or None if it was not returned. Only the first call gives it, so that y is freed early."""
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


# What a low-rank branch saves of its input: x, or the tensors from which an RMSNorm made x.
#
#     x = (h rstd) * w        dA = dU^T x = ((rstd * dU)^T h) * w
#
# A norm saves h and rstd for its own gradient. A branch that reads x saves the same two, and computes dA from h with
# scaled rows of dU and scaled columns of dA, so that x is neither saved nor recomputed.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
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
