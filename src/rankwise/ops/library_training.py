"""The element-wise parts of a training step as PyTorch sees them: schemas and fake implementations. For traced tensors;
`rankwise.ops.training` calls the kernels past all this.

An absent result is an empty tensor here: an operator always returns as many tensors as its schema says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.ops import checks_training as checks
from rankwise.ops import run_training as run

_library = torch.library.Library("rankwise", "FRAGMENT")
_library.define("low_rank_add_(Tensor(a!) y, Tensor u, Tensor B, float scale, Tensor? g=None, Tensor? bias=None) -> ()")
_library.define("scaled_grad(Tensor dy, Tensor? y, Tensor g) -> (Tensor, Tensor)")
_library.define("rms_norm(Tensor x, Tensor w, float eps, int offset=0, bool cast_first=True) -> (Tensor, Tensor)")
_library.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor w, Tensor rstd, int offset=0, Tensor? residual_grad=None) -> Tensor"
)
_library.define("glu(Tensor gate, Tensor up, str act) -> Tensor")
_library.define(
    "glu_backward(Tensor dout, Tensor gate, Tensor up, str act, bool want_product=True) -> (Tensor, Tensor, Tensor)"
)
_library.define("rope(Tensor q, Tensor cos, Tensor sin, bool inverse=False) -> Tensor")
_library.define("rope_(Tensor(a!) q, Tensor cos, Tensor sin, bool inverse=False) -> ()")
_library.define(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, float scale=1.0, float label_smoothing=0.0, "
    "float? softcap=None, float multiplier=1.0, bool want_grad=True, bool want_entropy=False, "
    "bool want_correct=False) -> (Tensor, Tensor, Tensor)"
)
_library.define("row_cross(Tensor W, Tensor A, Tensor B) -> Tensor")
_library.define("dropout(Tensor x, float p, int seed) -> Tensor")
_library.define("dropout_add_(Tensor(a!) dx, Tensor z, float p, int seed) -> ()")


def _low_rank_add_(
    y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None = None, bias: Tensor | None = None
) -> None:
    run.low_rank_add_(y, u, B, scale, g, bias)


def _fake_low_rank_add_(
    y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None = None, bias: Tensor | None = None
) -> None:
    checks.low_rank_add(y, u, B, g, bias)


def _scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
    dz, dot = run.scaled_grad(dy, y, g)
    return dz, _or_empty(dot, dy, torch.float32)


def _fake_scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
    checks.scaled_grad(dy, y, g)
    return _as(dy), dy.new_empty((0,) if y is None else g.shape, dtype=_wide(dy))


def _rms_norm(x: Tensor, w: Tensor, eps: float, offset: int = 0, cast_first: bool = True) -> tuple[Tensor, Tensor]:
    return run.rms_norm(x, w, eps, offset, cast_first)


def _fake_rms_norm(x: Tensor, w: Tensor, eps: float, offset: int = 0, cast_first: bool = True) -> tuple[Tensor, Tensor]:
    checks.rms_norm(x, w, offset)
    return _as(x), x.new_empty((x[..., 0].numel(),), dtype=_wide(x))


def _rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int = 0, residual_grad: Tensor | None = None
) -> Tensor:
    return run.rms_norm_backward(dy, x, w, rstd, offset, residual_grad)


def _fake_rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int = 0, residual_grad: Tensor | None = None
) -> Tensor:
    checks.rms_norm_backward(dy, x, w, rstd, offset, residual_grad)
    return _as(x)


def _fake_glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    checks.glu(gate, up, act)
    return _as(gate)


def _glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, want_product: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    dgate, dup, product = run.glu_backward(dout, gate, up, act, want_product)
    return dgate, dup, _or_empty(product, gate, gate.dtype)


def _fake_glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, want_product: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    checks.glu(gate, up, act, dout)
    return _as(gate), _as(gate), _as(gate) if want_product else gate.new_empty((0,))


def _rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """As it lies in memory: (B, L, H, D)."""
    return run.rope(q, cos, sin, inverse).transpose(1, 2)


def _fake_rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    checks.rope(q, cos, sin)
    B, H, L, D = q.shape
    return q.new_empty((B, L, H, D))


def _rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    run.rope_(q, cos, sin, inverse)


def _fake_rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    checks.rope(q, cos, sin)


def _cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    multiplier: float = 1.0,
    want_grad: bool = True,
    want_entropy: bool = False,
    want_correct: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, entropy, correct = run.cross_entropy_(
        logits, targets, scale, label_smoothing, softcap, multiplier, want_grad, want_entropy, want_correct
    )
    return loss, _or_empty(entropy, logits, checks.sum_dtype(logits)), _or_empty(correct, logits, torch.int64)


def _fake_cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    multiplier: float = 1.0,
    want_grad: bool = True,
    want_entropy: bool = False,
    want_correct: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.cross_entropy(logits, targets, label_smoothing, softcap, multiplier)
    entropy = logits.new_empty(() if want_entropy else (0,), dtype=checks.sum_dtype(logits))
    correct = logits.new_empty(() if want_correct else (0,), dtype=torch.int64)
    return logits.new_empty((), dtype=checks.sum_dtype(logits)), entropy, correct


def _fake_row_cross(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    checks.row_cross(W.shape, W.dtype, A, B, W.device)
    return W.new_empty((W.shape[0],), dtype=torch.float32)


def _fake_dropout(x: Tensor, p: float, seed: int) -> Tensor:
    checks.dropout(x, x, p)
    return _as(x)


def _dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> None:
    run.dropout_add_(dx, z, p, seed)


def _fake_dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> None:
    checks.dropout(dx, z, p)


def _as(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _or_empty(tensor: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((0,), dtype=dtype) if tensor is None else tensor


_OPERATORS: tuple[tuple[str, Any, Any], ...] = (
    ("low_rank_add_", _low_rank_add_, _fake_low_rank_add_),
    ("scaled_grad", _scaled_grad, _fake_scaled_grad),
    ("rms_norm", _rms_norm, _fake_rms_norm),
    ("rms_norm_backward", _rms_norm_backward, _fake_rms_norm_backward),
    ("glu", run.glu, _fake_glu),
    ("glu_backward", _glu_backward, _fake_glu_backward),
    ("rope", _rope, _fake_rope),
    ("rope_", _rope_, _fake_rope_),
    ("cross_entropy_", _cross_entropy_, _fake_cross_entropy_),
    ("row_cross", run.row_cross, _fake_row_cross),
    ("dropout", run.dropout, _fake_dropout),
    ("dropout_add_", _dropout_add_, _fake_dropout_add_),
)

for _name, _real, _fake in _OPERATORS:
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rankwise::{_name}", _fake, lib=_library)

operators = torch.ops.rankwise
