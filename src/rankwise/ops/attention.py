"""Attention in which every query sees contiguous ranges of keys: causal, padded, packed, a sliding window, or a
beginning that is laid once and the query's own row.

Legend: B batch, Lq queries, Lk keys, H query heads, Hkv key heads, D size of a head; i a query, j a key.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rankwise.compat.torch import Ctx, is_watched
from rankwise.errors import QuantizationError
from rankwise.ops import reference, selection
from rankwise.ops.checks import attention_forward
from rankwise.ops.cpu import attention as native_attention
from rankwise.ops.table import PLAIN


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``softmax(where(any(start <= j < end), scale * q @ k.mT, -inf)) @ v``, per head: `reference`.

    bfloat16 on a CPU, and float32 on a CPU with AVX2 only, runs in the native library (FlashAttention-2: memory is
    linear in the length, fully masked tiles are skipped, backward saves q, k, v, out and one float32 per query and
    head). All other cases run in ``scaled_dot_product_attention``; `obstacle` returns the reason.

    Args:
        q: (B, Lq, H, D), any strides; those of a projection's output need no copy.
        k, v: (B, Lk, Hkv, D), H a multiple of Hkv.
        start, end: int32 (B, Lq), or of R disjoint ranges (B, R, Lq), or None: start 0, end i + 1 + Lk - Lq (causal).
            Clamped to [0, Lk]. A query without keys gives zeros and gets no gradient.
        scale: 1 / sqrt(D) by default.

    Returns:
        (B, Lq, H, D) in the dtype of q, contiguous where the native kernel ran.

    Raises:
        QuantizationError: RW606, shapes, dtypes or devices that do not fit together; RW607, the native kernel was
            forced (`rankwise.ops.set_implementation`) and cannot run.
    """
    q, k, v = map(selection.as_autocast, (q, k, v))
    attention_forward(q, k, v, start, end, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = selection.forced()
    if choice == "reference":
        return plain_attention(q, k, v, start, end, scale)
    # A compiler cannot call the library; the operator checks when it runs.
    ask = native_attention.unfit if torch.compiler.is_compiling() else native_attention.obstacle
    why = ask(q, k, v, scale)
    if why is not None:
        if choice == "native":
            raise QuantizationError("RW607", f"the implementation 'native' was forced and cannot run: {why}")
        return _elsewhere(q, k, v, start, end, scale, why)
    # A compiler, a fake mode, a functional transform or a tensor subclass must see the call.
    if is_watched() or any(type(x) not in PLAIN for x in (q, k, v)):
        return torch.ops.rankwise.attention_forward(q, k, v, start, end, scale)[0]
    return _Attention.apply(q, k, v, start, end, scale)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None, end: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`attention` in plain PyTorch in float32 (float64 stays), with the whole (B, H, Lq, Lk) weights."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.attention_forward(q, k, v, start, end, scale)[0]


def obstacle(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> str | None:
    """Why `attention` uses PyTorch's ``scaled_dot_product_attention`` here; None if the native kernel runs."""
    return native_attention.obstacle(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


class _Attention(torch.autograd.Function):
    """The native kernel, called without PyTorch's dispatcher."""

    @staticmethod
    def forward(
        ctx: Ctx[float], q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, scale: float
    ) -> Tensor:
        out, lse = native_attention.attention_forward(q, k, v, start, end, scale)
        ctx.save_for_backward(q, k, v, out, lse, start, end)
        ctx.kept = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[float], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, start, end = ctx.saved_tensors
        dq, dk, dv = native_attention.attention_backward(grad, q, k, v, out, lse, start, end, ctx.kept)
        return dq, dk, dv, None, None, None


def _elsewhere(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, scale: float, why: str
) -> Tensor:
    """PyTorch's own kernel. Warns (RW608), once per process, where the native kernel was expected."""
    if q.device.type == "cpu" and q.dtype is torch.bfloat16:
        selection.say_once("RW608", f"attention runs in PyTorch's scaled_dot_product_attention, slowly: {why}")
    run = partial(functional.scaled_dot_product_attention, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if start is None and end is None and q.shape[2] == k.shape[2]:
        return run(q, k, v, is_causal=True).transpose(1, 2)
    seen = reference.visible(start, end, (q.shape[0], q.shape[2], k.shape[2]), q.device)[:, None]
    # A query without keys would give NaN in some of PyTorch's kernels, so it sees all keys and its result is dropped.
    empty = ~seen.any(-1, keepdim=True)
    return run(q, k, v, attn_mask=seen | empty).masked_fill(empty, 0.0).transpose(1, 2)
