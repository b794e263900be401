"""The steps of `rankwise.ops.low_rank_linear` as separate products: on every device and in every dtype.

Legend: T = rows of x, K = in features, N = out features, r = rank, R = the ranks of all branches together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.ops import eight_bit, elementwise
from rankwise.ops.branch import Branch, BranchGrads, Dropout, Wanted, grad_of_bias, grad_of_m

# Up to this number of float32 rows, PyTorch's small products are faster than the native low-rank addition.
FEW_ROWS = 16

# Dtypes of tensor cores, in which a product is rounded.
HALF = (torch.bfloat16, torch.float16)


def forward(rows: Tensor, branches: Sequence[Branch], dropout: Dropout | None) -> tuple[list[Tensor], Tensor]:
    """The outputs (T, N_i), and U = drop(x) [A_1; A_2; ...]^T (T, R)."""
    U = dropped(rows, dropout) @ _stacked_A(branches, rows.dtype).T
    parts = U.split([branch.A.shape[0] for branch in branches], dim=1)
    return [output(rows, U_i, branch.B.to(rows.dtype), branch) for U_i, branch in zip(parts, branches)], U


def output(rows: Tensor, U: Tensor, B: Tensor, branch: Branch) -> Tensor:
    """``g * (x W^T + s U B^T) + b``: (T, N)."""
    gain, bias = branch.gain, branch.bias
    if (scales := branch.frozen.scales) is not None:
        y = eight_bit.product(rows, branch.frozen.dense(rows.dtype), scales)
        bias = None if bias is None else bias.float()
        return elementwise.low_rank_add_(y, U.float(), B.float(), branch.scale, gain, bias).to(rows.dtype)
    if rows.dtype not in HALF or branch.frozen.is_decoded_for(rows):
        return elementwise.low_rank_add_(branch.frozen.product(rows), U, B, branch.scale, gain, bias)
    # An update below half a unit in the last place of an already rounded product would be lost. So both are summed in
    # float32 and rounded once.
    y = torch.addmm(U.new_empty(()), U, B.T, beta=0, alpha=branch.scale)
    y.addmm_(rows, branch.frozen.dense(rows.dtype).T)
    if gain is None and bias is None:
        return y
    return elementwise.low_rank_add_(y, U[:, :0], B[:, :0], 1.0, gain, bias)


def are_few(x: Tensor) -> bool:
    """Whether `of_few_rows` is faster for x (..., K), as in generation, where call overhead dominates."""
    return x.is_cpu and x.dtype is torch.float32 and x.numel() <= FEW_ROWS * x.shape[-1]


def of_few_rows(x: Tensor, branch: Branch) -> Tensor:
    """The output (..., N) of one branch without dropout, in as few calls as possible, without gradients."""
    A, B = branch.A, branch.B
    if not (A.dtype is B.dtype is x.dtype):
        A, B = A.to(x.dtype), B.to(x.dtype)
    y = branch.frozen.product(x).add_(F.linear(F.linear(x, A), B), alpha=branch.scale)
    if branch.gain is not None:
        y.mul_(branch.gain)
    return y if branch.bias is None else y.add_(branch.bias)


def backward(
    dys: Sequence[Tensor | None],
    branches: Sequence[Branch],
    ys: Sequence[Tensor | None],
    U: Tensor,
    dropout: Dropout | None,
    wanted: Sequence[Wanted],
    *,
    want_dx: bool,
) -> tuple[Tensor, Tensor | None, list[BranchGrads]]:
    """dU (T, R), dx (T, K), and the gradients of each branch but A's; dys and ys as rows."""
    dx: Tensor | None = None
    grads = []
    dU = torch.zeros_like(U) if any(dy is None for dy in dys) else torch.empty_like(U)
    first = 0
    for dy, branch, y, want in zip(dys, branches, ys, wanted):
        columns = slice(first, first + branch.A.shape[0])
        first = columns.stop
        if dy is None:
            grads.append(BranchGrads())
            continue
        dz, dm = _through_gain(dy, branch, y if want.m else None)
        dU[:, columns] = (dz @ branch.B.to(dz.dtype)).mul_(branch.scale)
        dB = (dz.T @ U[:, columns]).to(branch.B.dtype).mul_(branch.scale) if want.B else None
        grads.append(BranchGrads(dB, grad_of_bias(dy, branch) if want.bias else None, dm))
        dx = branch.frozen.add_input_grad(dz, dx) if want_dx else None
    return dU, None if dx is None else add_low_rank(dx, dU, _stacked_A(branches, dx.dtype), dropout), grads


def grad_A(dU: Tensor, rows: Tensor, dropout: Dropout | None) -> Tensor:
    """``dU^T drop(x)``: (R, K)."""
    return dU.T @ dropped(rows, dropout)


def _through_gain(dy: Tensor, branch: Branch, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``dz = g * dy``, and dm where y is given."""
    if branch.gain is None:
        return dy, None
    dz, dot = elementwise.scaled_grad(dy, y, branch.gain)
    return dz, None if dot is None else grad_of_m(dot, dy, branch)


def add_low_rank(dx: Tensor, dU: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
    """``dx + drop(dU A)``, in place."""
    if dropout is None:
        return dx.addmm_(dU, A)
    return dropout.add_(dx, dU @ A)


def dropped(rows: Tensor, dropout: Dropout | None) -> Tensor:
    return rows if dropout is None else dropout(rows)


def _stacked_A(branches: Sequence[Branch], dtype: torch.dtype) -> Tensor:
    """[A_1; A_2; ...] (R, K)."""
    if len(branches) == 1:
        return branches[0].A.to(dtype)
    return torch.cat([branch.A for branch in branches]).to(dtype)
