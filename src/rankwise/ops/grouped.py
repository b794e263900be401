"""Products of rows, sorted by expert, with their expert's matrix.

    y[rows of e] = x[rows of e] W_e          sum over e of the rows: G_e = a[rows of e]^T b[rows of e]

Legend: E experts, S rows of all experts, (K, N) one expert's matrix. On a GPU, in bfloat16, one kernel computes all
experts (``torch.nn.functional.grouped_mm``) if it supports the strides; else there is one product per expert.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.compat.torch import is_fake

ALIGNED_BYTES = 16
# grouped_mm wants rows to begin at multiples of it.
# Tracing one expert takes milliseconds in each layer, so a trace uses at most this number. Tensors over all rows keep
# their size; those of one expert have at least 1/16 of the rows, as with less evenly routed tokens.
MOST_TRACED = 16


def rows_per_expert(experts: Tensor, count: int) -> list[int]:
    """The number of rows of each of ``count`` experts in ``experts`` (S,).

    Fake tensors have no values: they stand for a step whose tokens are spread evenly over the first ``MOST_TRACED``
    experts.
    """
    if is_fake(experts):
        traced = min(count, MOST_TRACED)
        return [(experts.numel() + index) // traced for index in range(traced)] + [0] * (count - traced)
    return torch.bincount(experts, minlength=count).tolist()


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation ``order`` (S,): ``x[order][inverse(order)]`` is x."""
    places = torch.arange(order.numel(), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of each of ``count`` experts. ``experts``: (S,), the expert of each row, ascending."""

    experts: Tensor
    count: int

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The number of rows of each expert. Waits for the GPU, if the tensor is there."""
        return rows_per_expert(self.experts, self.count)

    @functools.cached_property
    def ends(self) -> Tensor:
        """The end of each expert's rows: int32 (E,), on the device, computed without a host synchronization."""
        ones = torch.ones_like(self.experts, dtype=torch.int32)
        sizes = ones.new_zeros(self.count).index_add_(0, self.experts, ones)
        return sizes.cumsum(0, dtype=torch.int32)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) of every expert with rows."""
        start = 0
        for index, size in enumerate(self.sizes):
            if size:
                yield index, slice(start, start + size)
            start += size


def grouped(x: Tensor, W: Tensor, rows: Rows) -> Tensor:
    """``y[rows of e] = x[rows of e] W[e]``: x (S, K), W (E, K, N) of its dtype -> (S, N)."""
    if one_kernel(x, W):
        return F.grouped_mm(x, W, offs=rows.ends)
    y = x.new_empty(x.shape[0], W.shape[2])
    for index, mine in rows.slices():
        torch.mm(x[mine], W[index], out=y[mine])
    return y


def add_grouped(y: Tensor, x: Tensor, W: Tensor, rows: Rows, scale: float = 1.0) -> Tensor:
    """``y += scale * grouped(x, W)``, in place."""
    if one_kernel(x, W):
        return y.add_(F.grouped_mm(x, W, offs=rows.ends), alpha=scale)
    for index, mine in rows.slices():
        y[mine].addmm_(x[mine], W[index], alpha=scale)
    return y


def grouped_outer(a: Tensor, b: Tensor, rows: Rows) -> Tensor:
    """``G[e] = a[rows of e]^T b[rows of e]``, zero for an expert without rows: (S, M), (S, N) -> (E, M, N)."""
    if one_kernel(a.T, b):
        return F.grouped_mm(a.T, b, offs=rows.ends)
    G = a.new_zeros(rows.count, a.shape[1], b.shape[1])
    for index, mine in rows.slices():
        torch.mm(a[mine].T, b[mine], out=G[index])
    return G


def one_kernel(a: Tensor, b: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes these factors.

    It needs a GPU of compute capability 8.0 or more, bfloat16, and aligned rows.
    """
    if not (a.is_cuda and a.dtype is b.dtype is torch.bfloat16 and hasattr(F, "grouped_mm")):
        return False
    return torch.cuda.get_device_capability(a.device) >= (8, 0) and are_aligned(a, b)


def are_aligned(a: Tensor, b: Tensor) -> bool:
    """Whether every row (or column) of the factors and of their product begins at a multiple of 16 bytes."""
    strides = [stride for tensor in (a, b) for stride in sorted(tensor.stride())[1:]]
    packed = all(min(tensor.stride()) == 1 for tensor in (a, b))
    return packed and all(n * a.element_size() % ALIGNED_BYTES == 0 for n in (*strides, b.shape[-1]))
