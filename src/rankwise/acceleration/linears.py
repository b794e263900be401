"""Frozen layers without an adapter, on CPUs where PyTorch has no bfloat16 instructions for their products."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rankwise.acceleration.replace import Undo, class_forward, is_free, replace_forward
from rankwise.adapters.low_rank import computes_in
from rankwise.compat.torch import Ctx
from rankwise.ops.dense import input_grad_out, is_slow_in_torch, linear_out
from rankwise.ops.selection import is_traced, stands_on_card


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
