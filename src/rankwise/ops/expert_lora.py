"""A layer's stacked experts with low-rank branches, and their gradients by hand.

    y = f_e(x),  f_e(x) = P_down(gate(P_up(x))),  P(x) = W_e x + b_e + s B_e A_e x      for each row x and its expert e

Legend: T tokens, k experts a token, S = T k rows; H hidden width, K = in and N = out features of one expert's matrix,
E experts, r rank. Kept for the backward pass: the tokens (T, H) where the first product adapts, what comes out of it
(S, N), and of each branch U = x A^T (S, r). The gated values are made again, and so are the k copies of each token.

    dU = s dz B     dB = s dz^T U     dA = dU^T x     dx = dz W + dU A        for each expert on its own rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.compat.torch import Ctx
from rankwise.ops.grouped import Rows, add_grouped, grouped, grouped_outer, inverse


class FrozenStack(Protocol):
    """All experts' frozen matrices W (E, N, K) of one kind, dense or packed."""

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        """``x W_e^T``, a new tensor: (S, K) -> (S, N)."""

    def input_grad(self, dz: Tensor, rows: Rows) -> Tensor:
        """``dz W_e``, a new tensor: (S, N) -> (S, K)."""


@dataclasses.dataclass(frozen=True)
class DenseStack:
    """W (E, N, K), or a transposed view of it."""

    W: Tensor

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        return grouped(x, self.W.transpose(1, 2), rows)

    def input_grad(self, dz: Tensor, rows: Rows) -> Tensor:
        return grouped(dz, self.W, rows)


@dataclasses.dataclass(frozen=True)
class ExpertBranch:
    """One of the two products. ``A`` and ``B`` are None where it is not adapted."""

    frozen: FrozenStack
    bias: Tensor | None = None  # (E, N), frozen
    scale: float = 1.0
    A: Tensor | None = None  # (E, r, K)
    B: Tensor | None = None  # (E, N, r)

    def forward(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """(P(x) (S, N), U (S, r))."""
        y, U = self.frozen.product(x, rows), None
        if self.bias is not None:
            _add_bias(y, self.bias, rows)
        if self.A is not None and self.B is not None:
            U = grouped(x, self.A.to(x.dtype).transpose(1, 2), rows)
            add_grouped(y, U, self.B.to(x.dtype).transpose(1, 2), rows, self.scale)
        return y, U

    def backward(
        self, dz: Tensor, x: Callable[[], Tensor] | None, U: Tensor | None, rows: Rows, *, want_dx: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dA, dB) in the dtypes of x, A and B; dA only if x is given, dB only if U is."""
        if self.A is None or self.B is None:
            return self.frozen.input_grad(dz, rows) if want_dx else None, None, None
        dB = None if U is None else grouped_outer(dz, U, rows).mul_(self.scale).to(self.B.dtype)
        dU = grouped(dz, self.B.to(dz.dtype), rows).mul_(self.scale)
        # x may be computed for this product only, so it is freed before dx is allocated.
        dA = None if x is None else grouped_outer(dU, x(), rows).to(self.A.dtype)
        if not want_dx:
            return None, dA, dB
        return add_grouped(self.frozen.input_grad(dz, rows), dU, self.A.to(dz.dtype), rows), dA, dB

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        return self.A, self.B

    def with_tensors(self, A: Tensor | None, B: Tensor | None) -> ExpertBranch:
        return dataclasses.replace(self, A=A, B=B)


def _add_bias(y: Tensor, bias: Tensor, rows: Rows) -> None:
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
    rows = Rows(experts.reshape(-1)[order], count)
    if not torch.is_grad_enabled():
        return _forward(x, order, rows, experts.shape[1], gate, up, down)[0]
    return _LowRankExperts.apply((rows, experts.shape[1], gate, up, down), order, x, *up.tensors, *down.tensors)


def _forward(
    x: Tensor,
    order: Tensor,
    rows: Rows,
    k: int,
    gate: Callable[[Tensor], Tensor],
    up: ExpertBranch,
    down: ExpertBranch,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, output of the first product, U of both products)."""
    z, U_up = up.forward(x[order // k], rows)
    y, U_down = down.forward(gate(z), rows)
    return y[inverse(order)], z, U_up, U_down


Fixed = tuple[Rows, int, Callable[[Tensor], Tensor], ExpertBranch, ExpertBranch]
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
