"""Attention on the native library, with the signatures of `rankwise.ops.reference`.

bfloat16 in and out, float32 sums; P and dS are rounded to bfloat16 for their products. With AVX2, which has no bfloat16
products, also float32 in and out, without rounding in between. Memory is linear in the length. Results do not depend on
the number of threads.

Legend: B batch, Lq queries, Lk keys, H query heads, Hkv key heads, D size of a head.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from rankwise.ops.cpu import native
from rankwise.ops.cpu.native import DTYPE, pointer

_HEAD_SIZES = range(16, 257, 16)


class _Heads(ctypes.Structure):
    """``rw_heads``: a tensor (B, L, heads, D) and its strides in elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


class _Attention(ctypes.Structure):
    """``rw_attention``: sizes, inputs and ranges of one call."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "Lq", "Lk", "H", "Hkv", "D")),
        *((name, _Heads) for name in ("q", "k", "v")),
        ("start", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int),
        ("R", ctypes.c_int64),
    )


def obstacle(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Why the native kernel cannot run on these tensors, as a sentence; None if it can."""
    return unfit(q, k, v, scale) or missing(q.dtype)


def unfit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """The part of `obstacle` that depends on the tensors, which a compiler can trace."""
    if q.device.type != "cpu":
        return f"the native kernel works on CPU tensors, and these are on {q.device}."
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPE):
        return f"the native kernel works in bfloat16 or float32, and these are {q.dtype}."
    if q.shape[-1] not in _HEAD_SIZES:
        return f"the native kernel takes heads of 16, 32, ..., 256 elements, and these have {q.shape[-1]}."
    if not 0 < scale < float("inf"):
        return f"the native kernel takes a positive scale, and this one is {scale}."
    return None


def missing(dtype: torch.dtype) -> str | None:
    """Why this process has no native attention for ``dtype``, or None if it has one."""
    why = _missing_library()
    if why is None and not native.library().rw_attention_available():
        why = "it needs AVX2, which this CPU, this build or RANKWISE_CPU_LEVEL does not give."
    if why is None and dtype is torch.float32 and not native.library().rw_attention_takes_float32():
        why = "on a CPU with bfloat16 products the native kernel supports bfloat16 only, and these are torch.float32."
    return why


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out (B, Lq, H, D); lse float32 (B, H, Lq), -inf where a query sees no key."""
    B, Lq, H, D = q.shape
    kept, call = _call(q, k, v, start, end, scale)
    out = torch.empty((B, Lq, H, D), dtype=q.dtype)
    lse = torch.empty((B, H, Lq), dtype=torch.float32)
    native.library().rw_attention_forward(ctypes.byref(call), out.data_ptr(), lse.data_ptr(), torch.get_num_threads())
    del kept
    return out, lse


def attention_backward(
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
    """dq, dk, dv, contiguous, of the shapes of q, k and v."""
    kept, call = _call(q, k, v, start, end, scale)
    grad, out, lse = _rows(grad.to(q.dtype)), out.contiguous(), lse.contiguous()
    if grad.shape != q.shape or out.shape != q.shape or lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        raise ValueError(f"gradient {grad.shape}, output {out.shape} and lse {lse.shape} do not fit q {q.shape}")
    if out.dtype is not q.dtype or lse.dtype is not torch.float32:
        raise ValueError(f"output and lse must be {q.dtype} and float32, not {out.dtype} and {lse.dtype}")
    made = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    native.library().rw_attention_backward(
        ctypes.byref(call),
        out.data_ptr(),
        lse.data_ptr(),
        ctypes.byref(_heads(grad)),
        *(x.data_ptr() for x in made),
        torch.get_num_threads(),
    )
    del kept
    return made[0], made[1], made[2]


_missing_library = cache(native.obstacle)


def _call(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, scale: float
) -> tuple[tuple[Tensor | None, ...], _Attention]:
    """(tensors that own the memory, C struct of the inputs). `rankwise.ops.checks.attention_forward` and `unfit` have
    checked them."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    start, end = (None if x is None else x.contiguous() for x in (start, end))
    (B, Lq, H, D), (_, Lk, Hkv, _) = q.shape, k.shape
    bounds, R = (pointer(start), pointer(end)), 1 if start is None or start.dim() == 2 else start.shape[1]
    call = _Attention(B, Lq, Lk, H, Hkv, D, _heads(q), _heads(k), _heads(v), *bounds, scale, DTYPE[q.dtype], R)
    return (q, k, v, start, end), call


def _rows(x: Tensor) -> Tensor:
    """x with the elements of a head contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))
