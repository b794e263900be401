"""Frozen products with low-rank branches, and their gradients by hand: the operator below LoRA, DoRA, QLoRA and QDoRA.

    y_i = g_i * (W_i x + s_i B_i A_i drop(x)) + b_i        for layers i that read the same x

Legend: T = rows of x, K = in features, N = out features, r = rank, R = the ranks of all layers together.
With U = drop(x) [A_1; A_2; ...]^T (T, R) one pass over x serves every layer. Kept for the backward pass: x, U, and of a
layer with a gain its output. The gain g = m / ||W + s B A|| is a constant but for m (DoRA, section 4.3).

    dz = g * dy     dU_i = s dz B     dB = s dz^T U_i     dA = dU^T drop(x)     dx = sum_i dz_i W_i + drop(dU A)
    dm = sum_T dy * (y - b) / m
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.ops import training


class Frozen(Protocol):
    """A weight W (N, K) that never trains, dense or packed."""

    def product(self, x: Tensor) -> Tensor:
        """``x W^T``, a new tensor: x (T, K) -> (T, N)."""

    def add_input_grad(self, dz: Tensor, dx: Tensor | None) -> Tensor:
        """``dx + dz W``, in place where dx (T, K) is given: dz (T, N) -> (T, K)."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """One layer: its frozen weight and what trains beside it. ``m`` and ``gain`` are None without DoRA."""

    frozen: Frozen
    scale: float
    A: Tensor
    # (r, K)
    B: Tensor
    # (N, r)
    bias: Tensor | None = None
    m: Tensor | None = None
    # (N,)
    gain: Tensor | None = None
    # (N,) in float32: m / ||W + s B A||, no entry of m zero.

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.A, self.B, self.bias, self.m


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Each element of x kept with probability 1 - p on its way into A; the mask follows from the seed."""

    p: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Glu:
    """The input is ``act(gate) * up``, computed again in the backward pass instead of kept."""

    act: str


def low_rank_linear(x: Tensor, branches: Sequence[Branch], dropout: Dropout | None = None) -> tuple[Tensor, ...]:
    """``y_i`` (..., N_i) of every branch for one x (..., K); differentiable in x, A, B, bias and m.

    x has the dtype of the frozen weights; A, B and m may be kept in float32 and are rounded to it for the products.
    """
    tensors = [tensor for branch in branches for tensor in branch.tensors]
    if not torch.is_grad_enabled():
        return _forward(x, branches, dropout)[0]
    return LowRankLinear.apply(tuple(branches), dropout, x, *tensors)


def low_rank_linear_of_glu(gate: Tensor, up: Tensor, act: str, branch: Branch, dropout: Dropout | None) -> Tensor:
    """``low_rank_linear(act(gate) * up)`` of one branch, without keeping the product: gate, up (..., K) -> (..., N)."""
    if not torch.is_grad_enabled():
        return _forward(training.glu(gate, up, act), (branch,), dropout)[0][0]
    return LowRankLinearOfGlu.apply(branch, act, dropout, gate, up, *branch.tensors)


class LowRankLinear(torch.autograd.Function):
    """See ``low_rank_linear``. Inputs: branches, dropout, x, then A, B, bias and m of every branch."""

    @staticmethod
    def forward(
        ctx: Any, branches: tuple[Branch, ...], dropout: Dropout | None, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, U = _forward(x, branches, dropout)
        ctx.branches, ctx.dropout = [_without_tensors(branch) for branch in branches], dropout
        ctx.save_for_backward(x, U, *tensors, *_kept_outputs(branches, ys))
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, U, *rest = ctx.saved_tensors
        branches, ys = _with_tensors(ctx.branches, rest)
        wanted = _wanted(ctx.needs_input_grad[3:])
        rows = x.reshape(-1, x.shape[-1])
        dU, dx, grads = _backward(dys, branches, ys, U, wanted, want_dx=ctx.needs_input_grad[2])
        dA = None if dU is None or not any(w[0] for w in wanted) else _grad_A(dU, rows, ctx.dropout)
        dx = _add_low_rank(dx, dU, branches, ctx.dropout) if ctx.needs_input_grad[2] else None
        return None, None, _like(dx, x), *_flat(grads, dA, branches, wanted)


class LowRankLinearOfGlu(torch.autograd.Function):
    """See ``low_rank_linear_of_glu``. Inputs: branch, act, dropout, gate, up, then A, B, bias and m."""

    @staticmethod
    def forward(
        ctx: Any,
        branch: Branch,
        act: str,
        dropout: Dropout | None,
        gate: Tensor,
        up: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        ys, U = _forward(training.glu(gate, up, act), (branch,), dropout)
        ctx.branches, ctx.act, ctx.dropout = [_without_tensors(branch)], act, dropout
        ctx.save_for_backward(gate, up, U, *tensors, *_kept_outputs((branch,), ys))
        return ys[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gate, up, U, *rest = ctx.saved_tensors
        branches, ys = _with_tensors(ctx.branches, rest)
        wanted = _wanted(ctx.needs_input_grad[5:])
        dU, dx, grads = _backward((dy,), branches, ys, U, wanted, want_dx=True)
        dx = _add_low_rank(dx, dU, branches, ctx.dropout)
        assert dx is not None, "one branch has a gradient"
        flat = (gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]))
        d_gate, d_up, rows = training.glu_backward(dx, *flat, ctx.act)
        dA = None if dU is None or rows is None or not wanted[0][0] else _grad_A(dU, rows, ctx.dropout)
        return None, None, None, _like(d_gate, gate), _like(d_up, up), *_flat(grads, dA, branches, wanted)


def _forward(x: Tensor, branches: Sequence[Branch], dropout: Dropout | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """The outputs, and U (T, R)."""
    rows = x.reshape(-1, x.shape[-1])
    U = _dropped(rows, dropout) @ _stacked_A(branches, x.dtype).T
    ys = []
    for branch, U_i in zip(branches, U.split([branch.A.shape[0] for branch in branches], dim=1)):
        y = branch.frozen.product(rows)
        training.low_rank_add_(y, U_i, branch.B.to(x.dtype), branch.scale, branch.gain, branch.bias)
        ys.append(y.view(*x.shape[:-1], y.shape[-1]))
    return tuple(ys), U


def _backward(
    dys: Sequence[Tensor | None],
    branches: Sequence[Branch],
    ys: Sequence[Tensor | None],
    U: Tensor,
    wanted: Sequence[Sequence[bool]],
    *,
    want_dx: bool,
) -> tuple[Tensor | None, Tensor | None, list[tuple[Tensor | None, ...]]]:
    """dU (T, R), the frozen part of dx (T, K), and per branch (dB, d bias, dm)."""
    dx: Tensor | None = None
    grads: list[tuple[Tensor | None, ...]] = []
    dU = torch.zeros_like(U) if any(dy is None for dy in dys) else torch.empty_like(U)
    first = 0
    for dy, branch, y, (_, want_B, want_bias, want_m) in zip(dys, branches, ys, wanted):
        columns = slice(first, first + branch.A.shape[0])
        first = columns.stop
        if dy is None:
            grads.append((None, None, None))
            continue
        dy = dy.reshape(-1, dy.shape[-1])
        dz, dm = _through_gain(dy, branch, y, want_m=want_m)
        dU[:, columns] = (dz @ branch.B.to(dz.dtype)).mul_(branch.scale)
        dB = (dz.T @ U[:, columns]).to(branch.B.dtype).mul_(branch.scale) if want_B else None
        grads.append((dB, dy.float().sum(0).to(branch.bias.dtype) if want_bias else None, dm))  # type: ignore[union-attr]
        dx = branch.frozen.add_input_grad(dz, dx) if want_dx else None
    return dU, dx, grads


def _through_gain(dy: Tensor, branch: Branch, y: Tensor | None, *, want_m: bool) -> tuple[Tensor, Tensor | None]:
    """``dz = g * dy`` and dm."""
    if branch.gain is None or branch.m is None:
        return dy, None
    rows = None if y is None or not want_m else y.reshape(-1, y.shape[-1])
    dz, dot = training.scaled_grad(dy, rows, branch.gain)
    if dot is None:
        return dz, None
    if branch.bias is not None:
        dot = dot - branch.bias.float() * dy.float().sum(0)
    # y = g (...) carries dm only where m is not 0: of a row of norm 0, which m cannot scale, the gradient is 0.
    m = branch.m.float()
    is_zero = m == 0
    return dz, torch.where(is_zero, 0.0, dot / torch.where(is_zero, 1.0, m)).to(branch.m.dtype)


def _add_low_rank(
    dx: Tensor | None, dU: Tensor | None, branches: Sequence[Branch], dropout: Dropout | None
) -> Tensor | None:
    """``dx + drop(dU A)``, in place."""
    if dx is None or dU is None:
        return dx
    A = _stacked_A(branches, dx.dtype)
    if dropout is None:
        return dx.addmm_(dU, A)
    return training.dropout_add_(dx, dU @ A, dropout.p, dropout.seed)


def _grad_A(dU: Tensor, rows: Tensor, dropout: Dropout | None) -> Tensor:
    """``dU^T drop(x)``: (R, K)."""
    return dU.T @ _dropped(rows, dropout)


def _dropped(rows: Tensor, dropout: Dropout | None) -> Tensor:
    return rows if dropout is None else training.dropout(rows, dropout.p, dropout.seed)


def _stacked_A(branches: Sequence[Branch], dtype: torch.dtype) -> Tensor:
    """[A_1; A_2; ...] (R, K)."""
    if len(branches) == 1:
        return branches[0].A.to(dtype)
    return torch.cat([branch.A for branch in branches]).to(dtype)


def _kept_outputs(branches: Sequence[Branch], ys: Sequence[Tensor]) -> list[Tensor | None]:
    """Only a trained magnitude needs the output again; what follows the layer mostly keeps it anyway."""
    return [None if branch.m is None or not branch.m.requires_grad else y for branch, y in zip(branches, ys)]


def _without_tensors(branch: Branch) -> Branch:
    """The tensors are saved by autograd, which notices when they change."""
    return dataclasses.replace(branch, A=None, B=None, bias=None, m=None)  # type: ignore[arg-type]


def _with_tensors(
    branches: Sequence[Branch], saved: Sequence[Tensor | None]
) -> tuple[list[Branch], Sequence[Tensor | None]]:
    filled = []
    for index, branch in enumerate(branches):
        A, B, bias, m = saved[4 * index : 4 * index + 4]
        assert A is not None, "saved of every branch"
        assert B is not None, "saved of every branch"
        filled.append(dataclasses.replace(branch, A=A, B=B, bias=bias, m=m))
    return filled, saved[4 * len(branches) :]


def _wanted(needs: Sequence[bool]) -> list[Sequence[bool]]:
    """Per branch, whether A, B, bias and m need a gradient."""
    return [needs[start : start + 4] for start in range(0, len(needs), 4)]


def _flat(
    grads: Sequence[tuple[Tensor | None, ...]],
    dA: Tensor | None,
    branches: Sequence[Branch],
    wanted: Sequence[Sequence[bool]],
) -> list[Tensor | None]:
    """dA, dB, d bias, dm of every branch, in the order of the inputs."""
    ranks = [branch.A.shape[0] for branch in branches]
    parts = [None] * len(branches) if dA is None else dA.split(ranks)
    flat: list[Tensor | None] = []
    for part, branch, rest, (want_A, *_) in zip(parts, branches, grads, wanted):
        flat += [part.to(branch.A.dtype) if want_A and part is not None else None, *rest]
    return flat


def _like(grad: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if grad is None else grad.view(tensor.shape)
