"""A layer's stacked experts with low-rank branches, gradients by hand; first the products with each expert's matrix.

    y[rows of e] = x[rows of e] W_e          sum over e of the rows: G_e = a[rows of e]^T b[rows of e]

Legend: E experts, S rows of all experts, (K, N) one expert's matrix. On a GPU, in bfloat16, one kernel computes all
experts (``torch.nn.functional.grouped_mm``) if it supports the strides. On a CPU, one call of the native library
computes a product and its branch for all experts. Else there is one product per expert.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rankwise.compat.torch import Ctx, is_fake
from rankwise.ops.cpu import products
from rankwise.ops.eight_bit import EightBit, Scales, calibrate
from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.selection import native_on_cpu

# grouped_mm wants rows to begin at multiples of it.
ALIGNED_BYTES = 16
# Tracing one expert takes milliseconds in each layer, so a trace uses at most this number. Tensors over all rows keep
# their size; those of one expert have at least 1/16 of the rows, as with less evenly routed tokens.
MOST_TRACED = 16


def rows_per_expert(experts: Tensor, count: int) -> list[int]:
    """The number of rows of each of ``count`` experts in ``experts`` (S,).

    Fake tensors have no values: they represent a step whose tokens are spread evenly over the first ``MOST_TRACED``
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
class RowsByExpert:
    """The rows of each of ``count`` experts. ``experts``: (S,), the expert of each row, ascending."""

    experts: Tensor
    count: int

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The number of rows of each expert. Waits for the GPU, if the tensor is there."""
        return rows_per_expert(self.experts, self.count)

    @functools.cached_property
    def counts(self) -> Tensor:
        """The same as an int64 tensor (E,), without a value for fake tensors."""
        if is_fake(self.experts):
            return self.experts.new_empty(self.count)
        return torch.bincount(self.experts, minlength=self.count)

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


def grouped(x: Tensor, W: Tensor, rows: RowsByExpert) -> Tensor:
    """``y[rows of e] = x[rows of e] W[e]``: x (S, K), W (E, K, N) of its dtype -> (S, N)."""
    if one_kernel(x, W):
        return F.grouped_mm(x, W, offs=rows.ends)
    y = x.new_empty(x.shape[0], W.shape[2])
    for index, mine in rows.slices():
        torch.mm(x[mine], W[index], out=y[mine])
    return y


def add_grouped(y: Tensor, x: Tensor, W: Tensor, rows: RowsByExpert, scale: float = 1.0) -> Tensor:
    """``y += scale * grouped(x, W)``, in place."""
    if one_kernel(x, W):
        return y.add_(F.grouped_mm(x, W, offs=rows.ends), alpha=scale)
    for index, mine in rows.slices():
        y[mine].addmm_(x[mine], W[index], alpha=scale)
    return y


def grouped_outer(a: Tensor, b: Tensor, rows: RowsByExpert) -> Tensor:
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


# The experts' operator:
#
#     y = f_e(x),  f_e(x) = P_down(gate(P_up(x))),  P(x) = W_e x + b_e + s B_e A_e x     for each row x, its expert e
#
# T tokens, k experts a token, S = T k rows; H hidden width, K = in and N = out features of one expert's matrix, r rank.
# Kept for the backward pass: the tokens (T, H) where the first product adapts, what comes out of it (S, N), and of each
# branch U = x A^T (S, r). The gated values are made again, and so are the k copies of each token.
#
#     dU = s dz B     dB = s dz^T U     dA = dU^T x     dx = dz W + dU A        for each expert on its own rows


class FrozenStack(Protocol):
    """All experts' frozen matrices W (E, N, K) of one kind, dense or packed."""

    def product(self, x: Tensor, rows: RowsByExpert) -> Tensor:
        """``x W_e^T``, a new tensor: (S, K) -> (S, N)."""

    def input_grad(self, dz: Tensor, rows: RowsByExpert) -> Tensor:
        """``dz W_e``, a new tensor: (S, N) -> (S, K)."""

    def factor(self) -> Stacked | None:
        """The matrices as the native library reads them, or None if it cannot."""

    @property
    def weight(self) -> Tensor | PackedWeight:
        """All of them."""

    def parts(self, dtype: torch.dtype) -> Iterable[Tensor]:
        """Each, dense: of ``dtype`` where they are packed."""


@dataclasses.dataclass(frozen=True)
class Stacked:
    """One matrix (N, K) of each expert: the first one, and the distance from one to the next in elements."""

    first: products.Factor
    shape: tuple[int, int]
    apart: int

    @classmethod
    def of(cls, W: Tensor) -> Stacked | None:
        """Of W (E, N, K); None if the native library cannot read it."""
        first = products.Factor.of(W[0])
        return None if first is None else cls(first, (W.shape[1], W.shape[2]), W.stride(0))


@dataclasses.dataclass(frozen=True)
class DenseStack:
    """W (E, N, K), or a transposed view of it."""

    W: Tensor

    def factor(self) -> Stacked | None:
        return Stacked.of(self.W)

    @property
    def weight(self) -> Tensor:
        return self.W

    def parts(self, dtype: torch.dtype) -> Iterable[Tensor]:
        return self.W.detach().unbind()

    def product(self, x: Tensor, rows: RowsByExpert) -> Tensor:
        return grouped(x, self.W.transpose(1, 2), rows)

    def input_grad(self, dz: Tensor, rows: RowsByExpert) -> Tensor:
        return grouped(dz, self.W, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertBranch:
    """One of the two products. ``A`` and ``B`` are None if it is not adapted."""

    frozen: FrozenStack
    bias: Tensor | None = None  # (E, N), frozen
    scale: float = 1.0
    A: Tensor | None = None  # (E, r, K)
    B: Tensor | None = None  # (E, N, r)
    # Where its frozen product is in 8 bits, which the native library alone computes.
    eight_bit: EightBit | None = None

    def forward(self, x: Tensor, rows: RowsByExpert) -> tuple[Tensor, Tensor | None]:
        """(P(x) (S, N), U (S, r))."""
        calibrate(x, [(self.eight_bit, self.frozen)])
        if (native := self.native(x)) is not None:
            return native.forward(x, rows)
        y, U = self.frozen.product(x, rows), None
        if self.bias is not None:
            _add_bias(y, self.bias, rows)
        if self.A is not None and self.B is not None:
            U = grouped(x, self.A.to(x.dtype).transpose(1, 2), rows)
            add_grouped(y, U, self.B.to(x.dtype).transpose(1, 2), rows, self.scale)
        return y, U

    def backward(
        self, dz: Tensor, x: Callable[[], Tensor] | None, U: Tensor | None, rows: RowsByExpert, *, want_dx: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dA, dB) in the dtypes of x, A and B; dA only if x is given, dB only if U is."""
        if (native := self.native(dz)) is not None:
            return native.backward(dz, x, U, rows, want_dx=want_dx)
        if self.A is None or self.B is None:
            return self.frozen.input_grad(dz, rows) if want_dx else None, None, None
        dB = None if U is None else grouped_outer(dz, U, rows).mul_(self.scale).to(self.B.dtype)
        dU = grouped(dz, self.B.to(dz.dtype), rows).mul_(self.scale)
        # x may be computed for this product only, so it is freed before dx is allocated.
        dA = None if x is None else grouped_outer(dU, x(), rows).to(self.A.dtype)
        if not want_dx:
            return None, dA, dB
        return add_grouped(self.frozen.input_grad(dz, rows), dU, self.A.to(dz.dtype), rows), dA, dB

    def native(self, rows: Tensor) -> NativeBranch | None:
        """This branch in one call of the native library for all experts, or None if it does not take ``rows``."""
        if not (rows.is_cpu and native_on_cpu() and products.take(rows.dtype)):
            return None
        W = self.frozen.factor()
        A, B = (None if factor is None else Stacked.of(factor) for factor in self.tensors)
        if W is None or (A is None) != (self.A is None) or (B is None) != (self.B is None):
            return None
        return NativeBranch(self, W, A, B, None if self.eight_bit is None else self.eight_bit.scales(self.frozen))

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        return self.A, self.B

    def with_tensors(self, A: Tensor | None, B: Tensor | None) -> ExpertBranch:
        return dataclasses.replace(self, A=A, B=B)


@dataclasses.dataclass(frozen=True)
class NativeBranch:
    """An `ExpertBranch` whose experts are computed together; a product and its low-rank part are one float32 sum."""

    branch: ExpertBranch
    W: Stacked
    A: Stacked | None
    B: Stacked | None
    scales: Scales | None

    def forward(self, x: Tensor, rows: RowsByExpert) -> tuple[Tensor, Tensor | None]:
        branch, terms, U = self.branch, [self._frozen_term(x, rows, across=False)], None
        if branch.A is not None and self.A is not None and self.B is not None:
            U = _sum([_term(x, self.A)], x.new_empty(x.shape[0], self.A.shape[0]), rows)
            terms.append(_term(U, self.B, scale=branch.scale))
        return _sum(terms, x.new_empty(x.shape[0], self.W.shape[0]), rows, branch.bias), U

    def backward(
        self, dz: Tensor, x: Callable[[], Tensor] | None, U: Tensor | None, rows: RowsByExpert, *, want_dx: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `ExpertBranch.backward`."""
        branch, dA, dB = self.branch, None, None
        dz = _dense_rows(dz)
        terms = [self._frozen_term(dz, rows, across=True)] if want_dx else []
        if branch.A is not None and branch.B is not None and self.A is not None and self.B is not None:
            if U is not None:
                dB = products.grouped_row_product(
                    U, dz, rows.counts, scale=branch.scale, by_column=True, dtype=branch.B.dtype
                )
            dU = dz.new_empty(dz.shape[0], self.B.shape[1])
            _sum([_term(dz, self.B, across=True, scale=branch.scale)], dU, rows)
            if x is not None:
                dA = products.grouped_row_product(dU, _dense_rows(x()), rows.counts, dtype=branch.A.dtype)
            terms.append(_term(dU, self.A, across=True))
        return _sum(terms, dz.new_empty(dz.shape[0], self.W.shape[1]), rows) if want_dx else None, dA, dB

    def _frozen_term(self, a: Tensor, rows: RowsByExpert, *, across: bool) -> tuple[products.Term, int]:
        if (scales := self.scales) is None:
            return _term(a, self.W, across=across)
        first = self.W.first
        q, of_rows = products.quantize_rows(
            _dense_rows(a), scales.row if across else scales.per_channel, rows.counts if across else None, dither=across
        )
        in_bytes = products.InBytes(of_rows, scales, first, across=across)
        return products.Term(a=q, W=first, across=across, in_bytes=in_bytes), self.W.apart


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _term(a: Tensor, W: Stacked, *, across: bool = False, scale: float = 1.0) -> tuple[products.Term, int]:
    return products.Term(a=_dense_rows(a), W=W.first, across=across, scale=scale), W.apart


def _sum(
    terms: Sequence[tuple[products.Term, int]], out: Tensor, rows: RowsByExpert, bias: Tensor | None = None
) -> Tensor:
    """out (S, columns) is overwritten with the sum of the terms, each with the distance between its weights."""
    parts, apart = zip(*terms)
    bias = None if bias is None else bias.float().contiguous()
    return products.add_grouped_products(parts, apart, rows.counts, out, bias)


def _add_bias(y: Tensor, bias: Tensor, rows: RowsByExpert) -> None:
    if y.is_cuda:
        # Gathering the rows' biases needs no wait for the GPU.
        y += bias[rows.experts]
        return
    for index, mine in rows.slices():
        y[mine] += bias[index]


def low_rank_experts(
    x: Tensor,
    experts: Tensor,
    count: int,
    gate: Callable[[Tensor], Tensor],
    up: ExpertBranch,
    down: ExpertBranch,
) -> Tensor:
    """``f_e(x_t)`` of each token for each of its experts, in their order; differentiable in x, A and B.

    x: (T, H) in the dtype of the frozen weights; experts: (T, k), integers below ``count``; gate: maps the output of
    ``up`` to the input of ``down``, a pure function of each row. Returns (T k, H). A and B may be in float32, and are
    rounded to the dtype of x for the products.
    """
    order = experts.reshape(-1).argsort(stable=True)
    rows = RowsByExpert(experts.reshape(-1)[order], count)
    if not torch.is_grad_enabled():
        return _forward(x, order, rows, experts.shape[1], gate, up, down)[0]
    return _LowRankExperts.apply((rows, experts.shape[1], gate, up, down), order, x, *up.tensors, *down.tensors)


def _forward(
    x: Tensor,
    order: Tensor,
    rows: RowsByExpert,
    k: int,
    gate: Callable[[Tensor], Tensor],
    up: ExpertBranch,
    down: ExpertBranch,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, output of the first product, U of both products)."""
    z, U_up = up.forward(x[order // k], rows)
    y, U_down = down.forward(gate(z), rows)
    return y[inverse(order)], z, U_up, U_down


Fixed = tuple[RowsByExpert, int, Callable[[Tensor], Tensor], ExpertBranch, ExpertBranch]
Kept = tuple[Fixed, Callable[[], AbstractContextManager[None]]]


class _LowRankExperts(torch.autograd.Function):
    """See ``low_rank_experts``. Inputs: the arguments without gradients, order, x, then A and B of both products."""

    @staticmethod
    def forward(ctx: Ctx[Kept], fixed: Fixed, order: Tensor, x: Tensor, *tensors: Tensor | None) -> Tensor:
        rows, k, gate, up, down = fixed
        y, z, *U = _forward(x, order, rows, k, gate, up, down)
        # The tensors are saved by autograd, which notices when they change.
        fixed = (rows, k, gate, up.with_tensors(None, None), down.with_tensors(None, None))
        is_cast = torch.is_autocast_enabled(x.device.type)
        ctx.kept = fixed, partial(torch.autocast, x.device.type, x.dtype) if is_cast else nullcontext
        ctx.save_for_backward(order, None if up.A is None else x, z, *U, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[Kept], dy: Tensor) -> tuple[Tensor | None, ...]:
        (rows, k, gate, up, down), autocast = ctx.kept
        order, x, z, U_up, U_down, *tensors = ctx.saved_tensors
        up, down = up.with_tensors(*tensors[:2]), down.with_tensors(*tensors[2:])
        want_x, *want_up = ctx.needs_input_grad[2:5]
        want_down = ctx.needs_input_grad[5:]
        with torch.enable_grad(), autocast():
            z = z.detach().requires_grad_()
            inner = gate(z)
        given = inner.detach if want_down[0] else None
        U_down = U_down if want_down[1] else None
        d_inner, dA_down, dB_down = down.backward(dy[order], given, U_down, rows, want_dx=True)
        (dz,) = torch.autograd.grad(inner, z, d_inner)
        del given, inner, d_inner, z
        given = (lambda: x[order // k]) if want_up[0] else None
        dx, dA_up, dB_up = up.backward(dz, given, U_up if want_up[1] else None, rows, want_dx=want_x)
        del dz
        if dx is not None:
            dx = dx[inverse(order)].view(order.numel() // k, k, -1).sum(1)
        return None, None, dx, dA_up, dB_up, dA_down, dB_down
