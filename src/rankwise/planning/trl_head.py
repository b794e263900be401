"""trl's fused output head in a trace; `train` uses it for the loss on a GPU where rankwise's is not in the model.

N scored positions, h hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.compat.torch import Ctx, is_fake
from rankwise.ops.selection import as_autocast
from rankwise.planning.head import TRL_TILE

# Number of float32 sums over the vocabulary for each position.
SUMS = 7


def sum_of_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """trl's loss, summed over N: hidden (N, h), weight (V, h), targets (N,). On fake tensors, its memory alone."""
    if is_fake(hidden):
        return Held.apply(hidden, weight).sum()
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("log_probs", "entropy", "is_top1")
    found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_TILE[1], None, 1.0, outputs)
    return -found[0].sum()


class Held(torch.autograd.Function):
    """Computes logits in tiles, again in the backward pass, and sums gradients in float32."""

    @staticmethod
    def forward(ctx: Ctx[None], hidden: Tensor, weight: Tensor) -> Tensor:
        sums = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(SUMS)]
        _tile(hidden, weight)
        ctx.save_for_backward(hidden, weight, sums[0], sums[1])
        return sums[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[None], grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *_ = ctx.saved_tensors
        needed = [x if wanted else None for x, wanted in zip((hidden, weight), ctx.needs_input_grad)]
        wide = [None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in needed]
        _tile(hidden, weight)
        return tuple(None if of is None else of.to(x.dtype) for of, x in zip(wide, (hidden, weight)))


def _tile(hidden: Tensor, weight: Tensor) -> None:
    """Allocate a tile's logits, and its rows of hidden states and weights in the dtype of the products."""
    rows, columns = TRL_TILE
    given = as_autocast(hidden[:rows]), as_autocast(weight[:columns])
    given[0].new_empty(min(len(hidden), rows), columns)
