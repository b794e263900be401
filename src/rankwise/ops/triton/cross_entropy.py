"""Cross-entropy of rows of logits, and its gradient written over the logits, in two passes over each row.

Legend: C = rows with logits, V = vocabulary, x = logits, z = argument of softmax.

The first pass keeps the largest z so far, M, and sums of exp(z - M), which are multiplied by exp(M - M') when a larger
M' is found.
The lower bound is one read and, with the gradient, another read and a write: 6 C V bytes in bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise.constants import IGNORED
from rankwise.ops.triton.tile import as_rows, launching_on, power_of_two, round_to, write_back

IGNORED_TARGET = tl.constexpr(IGNORED)

# Maximum number of logits of a row that a program processes at once, and logits per warp.
_COLUMNS, _PER_WARP = 4096, 256


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """(1 - e) / (1 + e) with e = exp(-2 |x|), and its series where 1 - e would lose digits."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    square = size * size
    small = size * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    result = tl.where(size < 0.1, small, large)
    return tl.where(x < 0.0, -result, result)


@triton.jit
def shaped(x: tl.tensor, multiplier: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """z = softcap * tanh(multiplier * x / softcap), or multiplier * x without a softcap; and dz/dx."""
    z = x.to(tl.float32) * multiplier
    slope = multiplier
    if softcap is not None:
        t = tanh(z / softcap)
        z = softcap * t
        slope = multiplier * (1.0 - t * t)
    return z, slope


@triton.jit
def score(
    row: tl.tensor,
    target: tl.tensor,
    V: tl.tensor,
    multiplier: tl.tensor,
    softcap: tl.tensor,
    ENTROPY: tl.constexpr,
    CORRECT: tl.constexpr,
    SMOOTH: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """M, sum exp(z - M), sum (z - M) exp(z - M), sum z, and whether another logit is ranked before the target's."""
    wanted = tl.load(row + target).to(tl.float32)
    largest, total, moment, mass, wrong = -float("inf"), 0.0, 0.0, 0.0, 0
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < V
        x = tl.load(row + column, mask=inside, other=-float("inf")).to(tl.float32)
        z, _ = shaped(x, multiplier, softcap)
        z = tl.where(inside, z, -float("inf"))
        new = tl.maximum(largest, tl.max(z, axis=0))
        # If no logit was finite so far, -inf - (-inf) would be NaN.
        base = tl.where(new == -float("inf"), 0.0, new)
        shrink, e = tl.exp(largest - base), tl.exp(z - base)
        if ENTROPY:
            rise = tl.where(largest == -float("inf"), 0.0, base - largest)
            moment = shrink * (moment - rise * total) + tl.sum(e * tl.where(e > 0.0, z - base, 0.0), axis=0)
        if SMOOTH:
            mass += tl.sum(tl.where(inside, z, 0.0), axis=0)
        if CORRECT:
            before = (x > wanted) | ((x == wanted) & (column < target)) | (x != x)
            wrong = tl.maximum(wrong, tl.max(before.to(tl.int32), axis=0))
        total = shrink * total + tl.sum(e, axis=0)
        largest = new
    return largest, total, moment, mass, wrong


@triton.jit
def differentiate(
    row: tl.tensor,
    target: tl.tensor,
    V: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    label_smoothing: tl.tensor,
    multiplier: tl.tensor,
    softcap: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """row = scale * (softmax(z) - (1 - s) onehot - s / V) * dz/dx, s the label smoothing."""
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(row + column, mask=column < V, other=-float("inf"))
        z, slope = shaped(x, multiplier, softcap)
        grad = tl.exp(z - largest) / total - label_smoothing / V
        grad = tl.where(column == target, grad - (1.0 - label_smoothing), grad)
        tl.store(row + column, round_to(scale * slope * grad, row.dtype.element_ty), mask=column < V)


@triton.jit
def cross_entropy_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    entropies: tl.tensor,
    corrects: tl.tensor,
    scale: tl.tensor,
    label_smoothing: tl.tensor,
    softcap: tl.tensor,
    multiplier: tl.tensor,
    V: tl.tensor,
    stride: tl.tensor,
    GRAD: tl.constexpr,
    SMOOTH: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The loss, entropy and correctness of one row, and its gradient in place; zeros where the target is ignored.

    The loss of a target outside the vocabulary is NaN.
    """
    at = tl.program_id(0).to(tl.int64)
    row, target = logits + at * stride, tl.load(targets + at)
    if (target < 0) | (target >= V):
        tl.store(losses + at, tl.where(target == IGNORED_TARGET, 0.0, float("nan")))
        if entropies is not None:
            tl.store(entropies + at, 0.0)
        if corrects is not None:
            tl.store(corrects + at, 0)
        if GRAD:
            for start in range(0, V, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                tl.store(row + column, tl.zeros((COLUMNS,), row.dtype.element_ty), mask=column < V)
    else:
        wanted, _ = shaped(tl.load(row + target), multiplier, softcap)
        largest, total, moment, mass, wrong = score(
            row, target, V, multiplier, softcap, entropies is not None, corrects is not None, SMOOTH, COLUMNS
        )
        loss = tl.log(total) + (largest - wanted)
        if SMOOTH:
            loss = (1.0 - label_smoothing) * loss + label_smoothing * (tl.log(total) + (largest - mass / V))
        tl.store(losses + at, loss)
        if entropies is not None:
            tl.store(entropies + at, tl.log(total) - moment / total)
        if corrects is not None:
            tl.store(corrects + at, 1 - wrong)
        if GRAD:
            differentiate(row, target, V, largest, total, scale, label_smoothing, multiplier, softcap, COLUMNS)


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    label_smoothing: float,
    softcap: float | None,
    multiplier: float,
    want_grad: bool,
    want_entropy: bool,
    want_correct: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, entropy, correct) and the gradient in place, as `rankwise.ops.reference.cross_entropy_`.

    The targets are not checked, since that would synchronize with the GPU.
    """
    C, V = logits.shape
    losses = logits.new_empty(C, dtype=torch.float32)
    entropies = logits.new_empty(C, dtype=torch.float32) if want_entropy else None
    corrects = logits.new_empty(C, dtype=torch.int32) if want_correct else None
    if C:
        rows, columns = as_rows(logits), min(power_of_two(V), _COLUMNS)
        with launching_on(logits.device):
            cross_entropy_kernel[(C,)](
                rows,
                targets.contiguous(),
                losses,
                entropies,
                corrects,
                float(scale),
                float(label_smoothing),
                None if softcap is None else float(softcap),
                float(multiplier),
                V,
                rows.stride(0),
                GRAD=want_grad,
                SMOOTH=label_smoothing != 0,
                COLUMNS=columns,
                num_warps=max(1, columns // _PER_WARP),
                enable_fp_fusion=True,
            )
        write_back(rows, logits)
    entropy = None if entropies is None else entropies.double().sum()
    return losses.double().sum(), entropy, None if corrects is None else corrects.sum()
