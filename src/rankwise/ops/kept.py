"""Values that are computed from parameters and kept until these change: DoRA's norms, 16-bit copies of A and B.

A tensor's version counter counts PyTorch's in-place operations, and a replaced tensor has a different storage. Two
kinds of writers bypass both. Optimizers with their own kernels (fused AdamW, bitsandbytes) are caught by the hook on
every optimizer's step. Code that writes through ``parameter.data`` is caught on a CPU by comparing with a copy of the
parameters (of rank size); on an accelerator the comparison would force a synchronisation, so such a write is noticed
at the next optimizer step only. A write to a frozen base through ``.data`` is not noticed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import weakref
from collections.abc import Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from rankwise.compat.torch import (
    FakeTensorMode,
    StorageWeakRef,
    WeakTensorKeyDictionary,
    copy_each,
    is_fake,
    mode_of,
    writes_to,
)
from rankwise.constants import ALIGNED
from rankwise.ops.selection import is_traced, transforms_functions

if TYPE_CHECKING:
    from rankwise.ops.branch import Branch

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
        same = all(torch.equal(copy, tensor) for copy, tensor in zip(self._copies, filter(_comparable, trained)))
        return self._value if same else None

    def keep(self, trained: tuple[Tensor, ...], frozen: Key, value: Tensor) -> Tensor:
        if _trackable((*trained, value)):
            self._key, self._value = _key(trained, frozen), value
            self._copies = [tensor.detach().clone() for tensor in trained if _comparable(tensor)]
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


def _comparable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not is_fake(tensor)


@functools.cache
def _count_optimizer_steps() -> None:
    register_optimizer_step_post_hook(_count)


def _count(*_: object) -> None:
    global _steps_taken
    _steps_taken += 1


# 16-bit copies of A and B for products on a GPU, made once per optimizer step, for all adapters in one launch.
#
#     A' = [A_1; A_2; ...] (R', K)        B_i' (N_i, r_i')
#
# Each r is padded with zeros to a multiple of ALIGNED, so that every branch's columns of U = x A'^T are aligned for
# tensor cores, also at rank 4. K = in features, N = out features, r = rank, R = the ranks of all branches together; a
# prime: with the zeros.


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The copies for the branches of one input."""

    # (R', K)
    A: Tensor
    # (N_i, r_i') each
    B: Sequence[Tensor]
    # r_i each
    ranks: Sequence[int]

    @property
    def has_zeros(self) -> bool:
        return any(B.shape[1] != rank for B, rank in zip(self.B, self.ranks))

    @property
    def columns(self) -> list[slice]:
        """The columns of each branch in U (T, R')."""
        ends = list(itertools.accumulate(B.shape[1] for B in self.B))
        return [slice(start, end) for start, end in zip([0, *ends], ends)]


class _Copy:
    """Copies of trained tensors, concatenated in one matrix, and the state of each tensor at the time of its copy."""

    def __init__(self, tensors: Sequence[Tensor], whole: Tensor, parts: Sequence[Tensor]) -> None:
        self.of = [weakref.ref(tensor) for tensor in tensors]
        self.whole, self.parts = whole, parts
        # The empty key marks a tensor that was not copied yet.
        self._keys: list[Key | None] = [()] * len(parts)

    def is_of(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
        found = [reference() for reference in self.of]
        return len(found) == len(tensors) and all(map(operator.is_, found, tensors)) and self.whole.dtype is dtype

    def stale(self) -> list[tuple[Tensor, Tensor]]:
        """(tensor, its copy) of each outdated copy. From now on these copies count as current."""
        pairs = []
        for index, (reference, part) in enumerate(zip(self.of, self.parts)):
            tensor = reference()
            if tensor is not None and (key := trained_key(tensor)) != self._keys[index]:
                self._keys[index] = key
                pairs.append((part, tensor))
        return pairs

    @property
    def place(self) -> tuple[torch.device, torch.dtype, FakeTensorMode | None]:
        """A key: copies with the same key are made together. Fake tensors of two modes do not mix."""
        return self.whole.device, self.whole.dtype, mode_of(self.whole)


# {first tensor of a copy: the copy}. An attribute of the tensor would be saved with it.
_kept: MutableMapping[Tensor, _Copy] = WeakTensorKeyDictionary()


def rounded(branches: Sequence[Branch], dtype: torch.dtype) -> Rounded:
    """The copies in ``dtype``, brought up to date."""
    # In this order, since leaving inference mode enables gradients.
    with torch.inference_mode(False), torch.no_grad():
        stacks = [[branch.A for branch in branches], *([branch.B] for branch in branches)]
        A, *Bs = (_copy(tensors, dtype, dim) for tensors, dim in zip(stacks, [0] + [1] * len(branches)))
        _refresh([A, *Bs])
    return Rounded(A.whole, [B.whole for B in Bs], [branch.A.shape[0] for branch in branches])


def copies_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The kept copies of these tensors."""
    return [kept.whole for tensor in tensors if (kept := _kept.get(tensor)) is not None]


def _copy(tensors: Sequence[Tensor], dtype: torch.dtype, dim: int) -> _Copy:
    """The cached copy, or a new one without values; ranks are along ``dim``."""
    kept = _kept.get(tensors[0])
    if kept is not None and kept.is_of(tensors, dtype):
        return kept
    ends = list(itertools.accumulate(-(-tensor.shape[dim] // ALIGNED) * ALIGNED for tensor in tensors))
    shape = list(tensors[0].shape)
    shape[dim] = ends[-1]
    whole = torch.zeros(shape, dtype=dtype, device=tensors[0].device)
    parts = [whole.narrow(dim, start, tensor.shape[dim]) for start, tensor in zip([0, *ends], tensors)]
    copy = _Copy(tensors, whole, parts)
    if all(trained_key(tensor) is not None for tensor in tensors):
        _kept[tensors[0]] = copy
    return copy


def _refresh(needed: Sequence[_Copy]) -> None:
    """Update these copies. If one of them was outdated, all copies with its key are updated in the same launch."""
    pairs = [pair for copy in needed for pair in copy.stale()]
    if not pairs:
        return
    place = needed[0].place
    pairs += [pair for copy in list(_kept.values()) if copy.place == place for pair in copy.stale()]
    copy_each([part for part, _ in pairs], [tensor for _, tensor in pairs])
