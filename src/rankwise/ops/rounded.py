"""16-bit copies of A and B for products on a GPU, made once per optimizer step, for all adapters in one launch.

    A' = [A_1; A_2; ...] (R', K)        B_i' (N_i, r_i')

Each r is padded with zeros to a multiple of ALIGNED, so that every branch's columns of U = x A'^T are aligned for
tensor cores, also at rank 4. K = in features, N = out features, r = rank, R = the ranks of all branches together; a
prime: with the zeros.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import weakref
from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import Tensor

from rankwise.compat.torch import FakeTensorMode, WeakTensorKeyDictionary, copy_each, mode_of
from rankwise.constants import ALIGNED
from rankwise.ops.branch import Branch
from rankwise.ops.kept import Key, trained_key


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
