"""The steps of `rankwise.ops.low_rank_linear` on a GPU for 16-bit rows, with few kernel launches; dy is read once for
both gradients of a branch.

A and B are the copies of `rankwise.ops.kept`, whose ranks are padded with zeros. A gain over a 4-bit weight is
multiplied into the dequantized weight, as it is written, and into B:

    y = x (g W)^T + s U (g B)^T + b        dx = sum_i dy_i (g_i W_i) + drop(dU A)        dU_i = s dy_i (g_i B_i)

so that ``dz = g * dy`` is written for dense weights only.

Legend: T = rows of x, K = in features, N = out features, r = rank, R = the ranks of all branches together, R' with the
zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.compat.torch import is_fake
from rankwise.ops import table
from rankwise.ops.branch import Branch, BranchGrads, Dropout, Wanted, grad_of_bias, grad_of_m
from rankwise.ops.kept import Rounded, rounded
from rankwise.ops.low_rank_plain import add_low_rank, dropped, output


def steps_for(rows: Tensor, branches: Sequence[Branch]) -> Steps:
    copies = rounded(branches, rows.dtype)
    return Steps(copies, [_folded(branch, B, rows) for branch, B in zip(branches, copies.B)])


def _folded(branch: Branch, like: Tensor, rows: Tensor) -> Tensor | None:
    """``g B``, rounded once, where the gain is folded into a dequantized 4-bit weight; else None."""
    if branch.gain is None or isinstance(branch.frozen.weight, Tensor) or branch.frozen.is_decoded_for(rows):
        return None
    B = branch.B.detach()
    gained = torch.empty_like(like) if B.shape == like.shape else torch.zeros_like(like)
    torch.mul(B, branch.gain.unsqueeze(1), out=gained[:, : B.shape[1]])
    return gained


@dataclasses.dataclass(frozen=True)
class Steps:
    """The functions of `rankwise.ops.low_rank_plain`."""

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
        dA = _product_in_float32(dU.T, dropped(rows, dropout))
        if not self.copies.has_zeros:
            return dA
        columns = zip(self.copies.columns, self.copies.ranks)
        return torch.cat([dA[place.start : place.start + rank] for place, rank in columns])


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in float32. Only on a GPU, PyTorch's product of 16-bit tensors can return its float32 sums."""
    if a.is_cuda or is_fake(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
