"""Element-wise parts of a transformer with gradients by hand: RMSNorm, rotary positions, gated activations.

Each keeps for its backward pass what it read and nothing in between.  T = tokens, D = width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.ops import training
from rankwise.ops.normed import Normed, remember


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension, w frozen; see ``ops.training.rms_norm``."""
    y, rstd = RmsNorm.apply(x, w, eps, offset, cast_first)
    if torch.is_grad_enabled():
        remember(y, Normed(x.detach(), w, rstd, eps, offset, cast_first))
    return y


class RmsNorm(torch.autograd.Function):
    """See ``rms_norm``; gives ``1 / sqrt(mean(x^2) + eps)`` of each row, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> tuple[Tensor, Tensor]:
        y, rstd = training.rms_norm(x.reshape(-1, x.shape[-1]), w, eps, offset, cast_first)
        ctx.save_for_backward(x, w, rstd)
        ctx.offset = offset
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return _shaped(y, x), rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
        x, w, rstd = ctx.saved_tensors
        flat = (dy.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
        return training.rms_norm_backward(*flat, w, rstd, ctx.offset).view(x.shape), None, None, None, None


class Rope(torch.autograd.Function):
    """``x cos + rotate_half(x) sin`` for x (B, H, L, D) and cos, sin (B or 1, L, D'), the form of most models."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return training.rope(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return training.rope(dy, cos, sin, inverse=True), None, None


class Glu(torch.autograd.Function):
    """``act(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _shaped(training.glu(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]), act), gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        rows, of_gate, of_up = (tensor.reshape(-1, gate.shape[-1]) for tensor in (dy, gate, up))
        d_gate, d_up, _ = training.glu_backward(rows, of_gate, of_up, ctx.act, want_product=False)
        return d_gate.view(gate.shape), d_up.view(gate.shape), None


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """No view: autograd lets nobody write to one that a Function gives."""
    return torch.ops.aten._unsafe_view(rows, like.shape)
