"""Parts of a transformer with hand-written gradients: RMSNorm, rotary positions, gated activations, frozen layers.

Element-wise ones save only their input for the backward pass.  T = tokens, D = width.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rankwise.acceleration.replace import Undo, class_forward, is_free, replace_forward
from rankwise.adapters.low_rank import computes_in
from rankwise.compat.torch import Ctx, WeakTensorKeyDictionary, unsafe_view, writes_to
from rankwise.ops import elementwise
from rankwise.ops.branch import input_grad_out, is_slow_in_torch, linear_out
from rankwise.ops.saved import Handback, Normed, offered_with_heads, remember
from rankwise.ops.selection import is_traced, stands_on_card


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension, w frozen; see ``ops.elementwise.rms_norm``."""
    y, rstd = RmsNorm.apply(x, w, eps, offset, cast_first)
    # If x needs no gradient, the norm saves nothing and x may be overwritten, so that a branch must save y.
    if y.requires_grad:
        remember(y, Normed(x.detach(), w, rstd, eps, offset, cast_first))
    return y


class RmsNorm(torch.autograd.Function):
    """See ``rms_norm``. Also returns ``1 / sqrt(mean(x^2) + eps)`` of each row."""

    @staticmethod
    def forward(ctx: Ctx[int], x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> tuple[Tensor, ...]:
        y, rstd = elementwise.rms_norm(x.reshape(-1, x.shape[-1]), w, eps, offset, cast_first)
        ctx.save_for_backward(x, w, rstd)
        ctx.kept = offset
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return _shaped(y, x), rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[int], dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        x, w, rstd = ctx.saved_tensors
        flat = (dy.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
        return elementwise.rms_norm_backward(*flat, w, rstd, ctx.kept).view(x.shape), None, None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + rotate_half(x) sin`` for x (B, H, L, D) and cos, sin (B or 1, L, D'), the form of most models."""
    handback = offered_with_heads(x) if torch.is_grad_enabled() else None
    if handback is not None:
        handback.is_promised = True
    return Rope.apply(x, cos, sin, handback if handback is not None and handback.is_wanted else None)


class Rope(torch.autograd.Function):
    """See ``rope``. With a handback, the result is saved, as attention does anyway, and rotated back into x."""

    @staticmethod
    def forward(ctx: Ctx[Handback | None], x: Tensor, cos: Tensor, sin: Tensor, handback: Handback | None) -> Tensor:
        turned = elementwise.rope(x, cos, sin)
        ctx.kept = handback
        ctx.save_for_backward(cos, sin, None if handback is None else turned)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[Handback | None], dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, turned = ctx.saved_tensors
        if ctx.kept is not None:
            ctx.kept.give(turned_back(turned, cos, sin).transpose(1, 2).flatten(2).flatten(0, 1))
        return elementwise.rope(dy, cos, sin, inverse=True), None, None, None


# {cosines of a step, which all layers share: their inverse angles}.
_inverses: MutableMapping[Tensor, tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor]]] = WeakTensorKeyDictionary()


def turned_back(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x of ``q = rope(x, cos, sin)``."""
    kept = _inverses.get(cos)
    if kept is None or kept[0] is not sin or kept[1] != (writes_to(cos), writes_to(sin)):
        kept = sin, (writes_to(cos), writes_to(sin)), inverse_angles(cos, sin)
        _inverses[cos] = kept
    _, _, (inverse_cos, inverse_sin) = kept
    return elementwise.rope(q, inverse_cos, inverse_sin, inverse=True)


def inverse_angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines with which the transposed rope is the inverse: for each pair of columns the inverse matrix
    ((cos_2, sin_1), (-sin_2, cos_1)) divided by the determinant, which is not 1 where angles are scaled."""
    dtype = torch.promote_types(cos.dtype, torch.float32)
    (cos_1, cos_2), (sin_1, sin_2) = (table.to(dtype).chunk(2, dim=-1) for table in (cos, sin))
    determinant = cos_1 * cos_2 + sin_1 * sin_2
    halves = torch.stack([cos_2, cos_1, sin_2, sin_1]) / determinant
    return halves[:2].movedim(0, -2).flatten(-2), halves[2:].movedim(0, -2).flatten(-2)


class Glu(torch.autograd.Function):
    """``act(gate) * up``."""

    @staticmethod
    def forward(ctx: Ctx[str], gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kept = act
        return _shaped(elementwise.glu(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]), act), gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[str], dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        rows, of_gate, of_up = (tensor.reshape(-1, gate.shape[-1]) for tensor in (dy, gate, up))
        d_gate, d_up, _ = elementwise.glu_backward(rows, of_gate, of_up, ctx.kept, want_product=False)
        return d_gate.view(gate.shape), d_up.view(gate.shape), None


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """``rows`` in the shape of ``like``, not as a view: autograd forbids writes to views that a Function returns."""
    return unsafe_view(rows, like.shape)


# Frozen layers without an adapter, on CPUs where PyTorch has no bfloat16 instructions for their products.


class FrozenLinear(torch.autograd.Function):
    """``x W^T + b`` with W (N, K) and b (N,) frozen: x (..., K) -> (..., N)."""

    @staticmethod
    def forward(ctx: Ctx[None], x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        rows = x.reshape(-1, x.shape[-1])
        return linear_out(rows, W, rows.new_empty(len(rows), len(W)), b).view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[None], dy: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = input_grad_out(rows, W, rows.new_empty(len(rows), W.shape[1]))
        return dx.view(*dy.shape[:-1], W.shape[1]), None, None


def use_native_products(model: nn.Module) -> int:
    """Use the native products for frozen layers without an adapter, where they are faster. Returns the layers' number.

    For evaluation and generation; ``optimize_for_training`` does the same for training.
    """
    return replace_linears(model, Undo())


def replace_linears(model: nn.Module, undo: Undo) -> int:
    """Replace every frozen linear layer in bfloat16, where that is faster. Returns the number of layers."""
    parameter = next(model.parameters())
    if not parameter.is_cpu or stands_on_card(parameter) or not is_slow_in_torch(torch.bfloat16):
        return 0
    found = [module for module in model.modules() if _is_frozen_linear(module) and is_free(module)]
    for module in found:
        replace_forward(module, _forward, undo)
    return len(found)


def _is_frozen_linear(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, Conv1D) or module.weight.dtype is not torch.bfloat16:
        return False
    return not any(parameter.requires_grad for parameter in module.parameters())


def _forward(self: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    is_native = x.dtype is torch.bfloat16 and computes_in(x.dtype, x.device)
    if is_traced() or not is_native or not _is_frozen_linear(self):
        return class_forward(self)(x)
    return FrozenLinear.apply(x, self.weight.T if type(self) is Conv1D else self.weight, self.bias)
