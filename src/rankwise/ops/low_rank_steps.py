"""The steps of `rankwise.ops.low_rank_linear`: as separate products, on every device and in every dtype; and on a GPU
for 16-bit rows, with few kernel launches.

Legend: T = rows of x, K = in features, N = out features, r = rank, R = the ranks of all branches together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.compat.torch import is_fake
from rankwise.ops import eight_bit, elementwise, table
from rankwise.ops.branch import Branch, BranchGrads, Dropout, Wanted, grad_of_bias, grad_of_m
from rankwise.ops.rounded import Rounded, rounded

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


# On a GPU. A and B are the copies of `rankwise.ops.kept`, whose ranks are padded with zeros; R' is R with the zeros. dy
# is read once for both gradients of a branch. A gain over a 4-bit weight is multiplied into the dequantized weight, as
# it is written, and into B:
#
#     y = x (g W)^T + s U (g B)^T + b        dx = sum_i dy_i (g_i W_i) + drop(dU A)        dU_i = s dy_i (g_i B_i)
#
# so that ``dz = g * dy`` is written for dense weights only.


def card_steps(rows: Tensor, branches: Sequence[Branch]) -> CardSteps:
    copies = rounded(branches, rows.dtype)
    return CardSteps(copies, [_folded(branch, B, rows) for branch, B in zip(branches, copies.B)])


def _folded(branch: Branch, like: Tensor, rows: Tensor) -> Tensor | None:
    """``g B``, rounded once, where the gain is folded into a dequantized 4-bit weight; else None."""
    if branch.gain is None or isinstance(branch.frozen.weight, Tensor) or branch.frozen.is_decoded_for(rows):
        return None
    B = branch.B.detach()
    gained = torch.empty_like(like) if B.shape == like.shape else torch.zeros_like(like)
    torch.mul(B, branch.gain.unsqueeze(1), out=gained[:, : B.shape[1]])
    return gained


@dataclasses.dataclass(frozen=True)
class CardSteps:
    """The functions `forward`, `backward` and `grad_A` of this file on a GPU."""

    copies: Rounded
    # For each branch ``g B`` (N, r'), or None if no gain is folded in.
    folded: Sequence[Tensor | None]

    def forward(self, rows: Tensor, branches: Sequence[Branch], dropout: Dropout | None) -> tuple[list[Tensor], Tensor]:
        """The outputs (T, N_i), and U = drop(x) A'^T (T, R')."""
        U = dropped(rows, dropout) @ self.copies.A.T
        ys = []
        for branch, columns, B, gained in zip(branches, self.copies.columns, self.copies.B, self.folded):
            if gained is None:
                ys.append(output(rows, U[:, columns], B, branch))
                continue
            y = torch.addmm(U.new_empty(()), U[:, columns], gained.T, beta=0, alpha=branch.scale)
            y.addmm_(rows, branch.frozen.dense(rows.dtype, branch.gain).T)
            ys.append(y if branch.bias is None else y.add_(branch.bias))
        return ys, U

    def backward(
        self,
        dys: Sequence[Tensor | None],
        branches: Sequence[Branch],
        ys: Sequence[Tensor | None],
        U: Tensor,
        dropout: Dropout | None,
        wanted: Sequence[Wanted],
        *,
        want_dx: bool,
    ) -> tuple[Tensor, Tensor | None, list[BranchGrads]]:
        """dU (T, R'), dx (T, K), and the gradients of each branch but A's; dys and ys as rows."""
        has_gaps = self.copies.has_zeros or any(dy is None for dy in dys)
        dU = torch.zeros_like(U) if has_gaps else torch.empty_like(U)
        dx, grads = None, []
        for index, (dy, branch, y, want) in enumerate(zip(dys, branches, ys, wanted)):
            if dy is None:
                grads.append(BranchGrads())
                continue
            gained = self.folded[index]
            dz, grad = self._branch_grads(index, branch, dy, y if want.m else None, (dU, U))
            if want.bias:
                grad.bias = grad_of_bias(dy, branch)
            grads.append(grad)
            dx = branch.frozen.add_input_grad(dz, dx, None if gained is None else branch.gain) if want_dx else None
        return dU, None if dx is None else add_low_rank(dx, dU, self.copies.A, dropout), grads

    def _branch_grads(
        self, index: int, branch: Branch, dy: Tensor, y: Tensor | None, ranks: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, BranchGrads]:
        """dz (T, N) and the gradients of B and m; fills the branch's columns of dU, the first of ``ranks``, from U."""
        gained, start = self.folded[index], self.copies.columns[index].start
        B, columns = self.copies.B[index] if gained is None else gained, slice(start, start + self.copies.ranks[index])
        dU, U = (both[:, columns] for both in ranks)
        # With a bias, y is not proportional to m, and the bias must be subtracted first.
        m = None if branch.bias is not None or branch.m is None else branch.m.detach()
        dB, dm, dz = table.call(
            "low_rank_grads_", dU, dy, U, B[:, : dU.shape[1]], branch.scale, branch.gain, gained is not None, y, m
        )
        if dm is not None:
            dm = grad_of_m(dm, dy, branch) if m is None else dm.to(m.dtype)
        return dy if dz is None else dz, BranchGrads(dB.to(branch.B.dtype), None, dm)

    def grad_A(self, dU: Tensor, rows: Tensor, dropout: Dropout | None) -> Tensor:
        """``dU^T drop(x)``: (R, K) in float32."""
        a, b = dU.T, dropped(rows, dropout)
        # Only on a GPU, PyTorch's product of 16-bit tensors can return its float32 sums.
        dA = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda or is_fake(a) else a.float() @ b.float()
        if not self.copies.has_zeros:
            return dA
        columns = zip(self.copies.columns, self.copies.ranks)
        return torch.cat([dA[place.start : place.start + rank] for place, rank in columns])
