"""The steps of `rankwise.ops.low_rank_linear` in the native library: one sum of products for each output and each
gradient.

The low-rank branch is one more term beside the frozen weight, and DoRA's gain g is applied to the sums before they are
rounded. In the backward pass g multiplies the rows of W and B, so ``dz = g * dy`` is never stored:

    dx = sum_i dy_i (g_i W_i) + dU A        dU_i = dy_i (s g_i B_i)        dB_i = s g_i (dy_i^T U_i)

Legend: T = rows of x, K = in features, N = out features, r = rank, R = the ranks of all branches together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.ops.branch import Branch, BranchGrads, Dropout, Wanted, grad_of_bias, grad_of_m
from rankwise.ops.cpu.native import OF_OUTPUTS, roomy
from rankwise.ops.cpu.products import (
    MOST_TERMS,
    Factor,
    InBytes,
    Term,
    add_products,
    pay,
    quantize_rows,
    row_product,
    take,
)
from rankwise.ops.eight_bit import Scales
from rankwise.ops.low_rank_steps import dropped


def steps_for(rows: Tensor, branches: Sequence[Branch]) -> Steps | None:
    """The native steps for rows (T, K) through these branches; None if the native products cannot read the weights in
    place, or are not faster.
    """
    if len(branches) >= MOST_TERMS or not take(rows.dtype):
        return None
    factors, of_bytes = [], []
    for branch in branches:
        scales = branch.frozen.scales
        factor = Factor.of_frozen(branch.frozen.weight, scales)
        if factor is None or (scales is None and not pay(rows, factor)):
            return None
        factors.append(factor)
        of_bytes.append(scales)
    return Steps(factors, of_bytes)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The functions of `rankwise.ops.low_rank_linear`, with the frozen weights in the native library's form."""

    factors: Sequence[Factor]
    # Of weights whose products are in 8 bits.
    scales: Sequence[Scales | None]

    def forward(self, rows: Tensor, branches: Sequence[Branch], dropout: Dropout | None) -> tuple[list[Tensor], Tensor]:
        """The outputs (T, N_i), and U = drop(x) [A_1; A_2; ...]^T (T, R)."""
        rows = _dense(rows)
        T, ranks = rows.shape[0], [branch.A.shape[0] for branch in branches]
        # With A and B in float32, U keeps what rounding leaves. Outputs and gradients are then more exact than those
        # of the same branch computed in float32 and added to a rounded product.
        are_floats = all(matrix.dtype is torch.float32 for branch in branches for matrix in (branch.A, branch.B))
        exact = are_floats and rows.dtype is torch.bfloat16
        U, rest = rows.new_empty(T, sum(ranks)), rows.new_empty(T, sum(ranks)) if exact else None
        add_products([Term(a=dropped(rows, dropout), W=_stacked_A(branches), exact=exact)], U, rest=rest)
        rests = [None] * len(ranks) if rest is None else rest.split(ranks, dim=1)
        ys, made = [], {}
        for branch, factor, scales, U_i, rest_i in zip(
            branches, self.factors, self.scales, U.split(ranks, dim=1), rests
        ):
            low_rank = Term(a=U_i, W=_factor(branch.B), scale=branch.scale, exact=exact, a_rest=rest_i)
            bias = None if branch.bias is None else branch.bias.float()
            y = roomy((T, branch.B.shape[0]), rows.dtype, OF_OUTPUTS)
            frozen = Term(a=rows, W=factor)
            if scales is not None:
                # Weights that were calibrated together share their channel scales.
                if id(scales.channel) not in made:
                    made[id(scales.channel)] = quantize_rows(rows, scales.per_channel)
                q, a = made[id(scales.channel)]
                frozen = Term(a=q, W=factor, in_bytes=InBytes(a, scales, factor, across=False))
            ys.append(add_products([frozen, low_rank], y, branch.gain, bias))
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
        """dU (T, R), dx (T, K), and the gradients of each branch but A's; dys and ys as rows."""
        dys = [None if dy is None else _dense(dy) for dy in dys]
        dU = torch.zeros_like(U) if any(dy is None for dy in dys) else torch.empty_like(U)
        grads, terms, first = [], [], 0
        for dy, branch, factor, scales, y, want in zip(dys, branches, self.factors, self.scales, ys, wanted):
            columns = slice(first, first + branch.A.shape[0])
            first = columns.stop
            if dy is None:
                grads.append(BranchGrads())
                continue
            B = Term(a=dy, W=_factor(branch.B), across=True, gain=branch.gain, scale=branch.scale)
            add_products([B], dU[:, columns])
            grads.append(_branch_grads(dy, branch, y, U[:, columns], want))
            if scales is None or not want_dx:
                terms.append(Term(a=dy, W=factor, across=True, gain=branch.gain))
            else:
                of_rows = scales.row if branch.gain is None else scales.row * branch.gain
                q, b = quantize_rows(dy, of_rows, dither=True)
                terms.append(Term(a=q, W=factor, across=True, in_bytes=InBytes(b, scales, factor, across=True)))
        return dU, _grad_x(terms, dU, branches, dropout) if want_dx else None, grads

    def grad_A(self, dU: Tensor, rows: Tensor, dropout: Dropout | None) -> Tensor:
        """``dU^T drop(x)``: (R, K) in float32."""
        return row_product(dU, dropped(_dense(rows), dropout))[0]


def _branch_grads(dy: Tensor, branch: Branch, y: Tensor | None, U: Tensor, want: Wanted) -> BranchGrads:
    dbias = grad_of_bias(dy, branch) if want.bias else None
    if not (want.B or want.m):
        return BranchGrads(bias=dbias)
    # If y has no bias, the same pass gives dm.
    m = branch.m if want.m else None
    divisor = None if m is None or branch.bias is not None else m.float().contiguous()
    dB, dot = row_product(
        U,
        dy,
        y=None if m is None or y is None else _dense(y),
        divisor=divisor,
        scale=branch.scale,
        gain=branch.gain,
        by_column=True,
    )
    dm = None
    if dot is not None and m is not None:
        dm = grad_of_m(dot, dy, branch) if divisor is None else dot.to(m.dtype)
    return BranchGrads(dB.to(branch.B.dtype) if want.B else None, dbias, dm)


def _grad_x(terms: list[Term], dU: Tensor, branches: Sequence[Branch], dropout: Dropout | None) -> Tensor:
    """``sum_i dy_i (g_i W_i) + drop(dU A)`` (T, K)."""
    shape = dU.shape[0], branches[0].A.shape[1]
    low_rank = Term(a=dU, W=_stacked_A(branches), across=True)
    if dropout is None:
        return add_products([*terms, low_rank], dU.new_empty(shape))
    dx = add_products(terms, dU.new_empty(shape))
    return dropout.add_(dx, add_products([low_rank], dU.new_empty(shape)))


def _dense(rows: Tensor) -> Tensor:
    """Rows with contiguous elements."""
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def _factor(matrix: Tensor) -> Factor:
    """A or B as a factor: float32 and bfloat16 are read in place."""
    if matrix.dtype not in (torch.float32, torch.bfloat16):
        matrix = matrix.float()
    matrix = matrix.contiguous()
    return Factor(matrix, matrix.stride(0))


def _stacked_A(branches: Sequence[Branch]) -> Factor:
    """[A_1; A_2; ...] (R, K)."""
    return _factor(branches[0].A if len(branches) == 1 else torch.cat([branch.A for branch in branches]))
