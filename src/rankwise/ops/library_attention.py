"""Attention as PyTorch sees it: schemas, fake implementations, gradients. For traced tensors; `rankwise.ops.attention`
calls the native library past all this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.ops import reference_attention
from rankwise.ops.cpu import attention as native_attention
from rankwise.ops.selection import say_once

_RANGE = "Tensor? start, Tensor? end, float scale"

_library = torch.library.Library("rankwise", "FRAGMENT")
_library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_RANGE}) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_RANGE}) -> (Tensor, Tensor, Tensor)"
)


def dispatched(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, scale: float) -> Tensor:
    """`rankwise.ops.attention.attention` through PyTorch's dispatcher."""
    return torch.ops.rankwise.attention_forward(q, k, v, start, end, scale)[0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    why = native_attention.obstacle(q, k, v, scale)
    if why is None:
        return native_attention.attention_forward(q, k, v, start, end, scale)
    say_once("RW608", f"compiled attention runs in plain PyTorch, slowly: {why}")
    return reference_attention.attention_forward(q, k, v, start, end, scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if native_attention.obstacle(q, k, v, scale) is None:
        return native_attention.attention_backward(grad, q, k, v, out, lse, start, end, scale)
    return reference_attention.attention_backward(grad, q, k, v, out, start, end, scale)


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, Lq, H, D = q.shape
    return q.new_empty((B, Lq, H, D)), q.new_empty((B, H, Lq), dtype=torch.float32)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, start, end, scale = inputs
    ctx.save_for_backward(q, k, v, *output, start, end)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    dq, dk, dv = torch.ops.rankwise.attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, None, None


for _name, _run, _fake in (
    ("attention_forward", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rankwise::{_name}", _fake, lib=_library)

torch.library.register_autograd("rankwise::attention_forward", _gradient, setup_context=_save, lib=_library)
