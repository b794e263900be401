"""The functions of `rankwise.ops.training` on real tensors: checks, then the native library or plain PyTorch."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rankwise.ops import checks_training as checks
from rankwise.ops import reference_training, selection

_NATIVE = (torch.float32, torch.bfloat16)


def low_rank_add_(y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None, bias: Tensor | None) -> Tensor:
    checks.low_rank_add(y, u, B, g, bias)
    return _module(y).low_rank_add_(y, u, B, scale, g, bias)


def scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    checks.scaled_grad(dy, y, g)
    return _module(dy).scaled_grad(dy, y, g)


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> tuple[Tensor, Tensor]:
    checks.rms_norm(x, w, offset)
    return _module(x).rms_norm(x, w, eps, offset, cast_first)


def rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int, residual_grad: Tensor | None
) -> Tensor:
    checks.rms_norm_backward(dy, x, w, rstd, offset, residual_grad)
    return _module(dy).rms_norm_backward(dy, x, w, rstd, offset, residual_grad)


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    checks.glu(gate, up, act)
    return _module(gate).glu(gate, up, act)


def glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, want_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.glu(gate, up, act, dout)
    return _module(dout).glu_backward(dout, gate, up, act, want_product)


def rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    checks.rope(q, cos, sin)
    return _module(q).rope(q, cos, sin, inverse)


def rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    checks.rope(q, cos, sin)
    return _module(q).rope_(q, cos, sin, inverse)


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
    checks.cross_entropy(logits, targets, label_smoothing, softcap, multiplier)
    return _module(logits).cross_entropy_(
        logits, targets, scale, label_smoothing, softcap, multiplier, want_grad, want_entropy, want_correct
    )


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    checks.dropout(x, x, p)
    return _module(x).dropout(x, p, seed)


def dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> Tensor:
    checks.dropout(dx, z, p)
    return _module(dx).dropout_add_(dx, z, p, seed)


def _module(tensor: Tensor) -> ModuleType:
    """The module whose functions run on ``tensor``."""
    if tensor.is_cpu and tensor.dtype in _NATIVE and selection.native_on_cpu():
        from rankwise.ops.cpu import training

        return training
    return reference_training
