"""The element-wise parts of a training step: one pass over memory each, no autograd.

Float32 and bfloat16 on a CPU run in the native library, called directly: PyTorch's dispatcher would cost more than some
of the kernels. Traced tensors (FakeTensor, ``torch.compile``) go through operators registered in
``rankwise.ops.library_training``; everything else runs in plain PyTorch.

Legend: T = rows (all leading dimensions together), N and D = columns, R = rank, V = vocabulary, C = rows with logits;
B, H, L = batch, heads, positions. bfloat16 is computed in float32 and rounded once, unless the formula says otherwise.
Results depend neither on the number of threads nor on chance. Arguments that do not fit raise QuantizationError RW620.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rankwise.ops import checks_training as checks
from rankwise.ops import reference_training, selection

_PLAIN = (Tensor, torch.nn.Parameter)
_NATIVE = (torch.float32, torch.bfloat16)

ACTIVATIONS = checks.ACTIVATIONS


def low_rank_add_(
    y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``y <- g * (y + scale * u B^T) + bias`` in place: what LoRA and DoRA add to a frozen product.

    y (T, N), u (T, R) and B (N, R) of one dtype; g (N,) float32; bias (N,). Rows of y and u may be apart.
    """
    if _traced(y):
        torch.ops.rankwise.low_rank_add_(y, u, B, scale, g, bias)
        return y
    return run_low_rank_add_(y, u, B, scale, g, bias)


def run_low_rank_add_(y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None, bias: Tensor | None) -> Tensor:
    checks.low_rank_add(y, u, B, g, bias)
    return _module(y).low_rank_add_(y, u, B, scale, g, bias)  # type: ignore[no-any-return]


def scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """``dz = dy * g`` and ``dot = sum_T dy * y`` in one pass; dot is None without y.

    dy and y (T, N) of one dtype; g (N,) float32 -> dz as dy, contiguous; dot (N,) float32.
    """
    if _traced(dy):
        dz, dot = torch.ops.rankwise.scaled_grad(dy, y, g)
        return dz, None if y is None else dot
    return run_scaled_grad(dy, y, g)


def run_scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    checks.scaled_grad(dy, y, g)
    return _module(dy).scaled_grad(dy, y, g)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int = 0, cast_first: bool = True) -> tuple[Tensor, Tensor]:
    """``y = (offset + w) * (x rstd)``, ``rstd = 1 / sqrt(mean(x^2) + eps)``.

    With ``cast_first``, ``x rstd`` is rounded to x's dtype before it is multiplied, as transformers' Llama does; Gemma
    is offset 1 without it. x (T, D), w (D,) -> y as x, contiguous; rstd (T,) float32.
    """
    if _traced(x):
        return torch.ops.rankwise.rms_norm(x, w, eps, offset, cast_first)  # type: ignore[no-any-return]
    return run_rms_norm(x, w, eps, offset, cast_first)


def run_rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> tuple[Tensor, Tensor]:
    checks.rms_norm(x, w, offset)
    return _module(x).rms_norm(x, w, eps, offset, cast_first)  # type: ignore[no-any-return]


def rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int = 0, residual_grad: Tensor | None = None
) -> Tensor:
    """``dx = rstd (h - x rstd^2 mean(h x)) + residual_grad`` with ``h = dy (offset + w)``.

    dy, x and residual_grad (T, D), w (D,), rstd (T,) float32 -> dx as x, contiguous.
    """
    if _traced(dy):
        return torch.ops.rankwise.rms_norm_backward(dy, x, w, rstd, offset, residual_grad)  # type: ignore[no-any-return]
    return run_rms_norm_backward(dy, x, w, rstd, offset, residual_grad)


def run_rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int, residual_grad: Tensor | None
) -> Tensor:
    checks.rms_norm_backward(dy, x, w, rstd, offset, residual_grad)
    return _module(dy).rms_norm_backward(dy, x, w, rstd, offset, residual_grad)  # type: ignore[no-any-return]


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``act(gate) * up`` with act "silu", "gelu_tanh" or "gelu": (T, N) each, rows may be apart -> contiguous."""
    if _traced(gate):
        return torch.ops.rankwise.glu(gate, up, act)  # type: ignore[no-any-return]
    return run_glu(gate, up, act)


def run_glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    checks.glu(gate, up, act)
    return _module(gate).glu(gate, up, act)  # type: ignore[no-any-return]


def glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, *, want_product: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dgate = dout up act'(gate)``, ``dup = dout act(gate)``, and ``act(gate) up`` again where wanted, else None.

    (T, N) each, rows of the inputs may be apart -> three contiguous tensors.
    """
    if _traced(dout):
        dgate, dup, product = torch.ops.rankwise.glu_backward(dout, gate, up, act, want_product)
        return dgate, dup, product if want_product else None
    return run_glu_backward(dout, gate, up, act, want_product)


def run_glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, want_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.glu(gate, up, act, dout)
    return _module(dout).glu_backward(dout, gate, up, act, want_product)  # type: ignore[no-any-return]


def rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """``q cos + rotate_half(q) sin``, as transformers' apply_rotary_pos_emb; ``inverse``: its transpose, the gradient.

    q (B, H, L, D), any strides; cos and sin (B or 1, L, D'), D' even and at most D: the other columns stay.
    -> (B, H, L, D), the transpose of a contiguous (B, L, H, D).
    """
    if _traced(q):
        return torch.ops.rankwise.rope(q, cos, sin, inverse).transpose(1, 2)  # type: ignore[no-any-return]
    return run_rope(q, cos, sin, inverse)


def run_rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    checks.rope(q, cos, sin)
    return _module(q).rope(q, cos, sin, inverse)  # type: ignore[no-any-return]


def rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """`rope` in place: q (B, H, L, D), any strides; cos and sin (B or 1, L, D')."""
    if _traced(q):
        torch.ops.rankwise.rope_(q, cos, sin, inverse)
        return q
    return run_rope_(q, cos, sin, inverse)


def run_rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    checks.rope(q, cos, sin)
    return _module(q).rope_(q, cos, sin, inverse)  # type: ignore[no-any-return]


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    multiplier: float = 1.0,
    want_grad: bool = True,
    *,
    want_entropy: bool = False,
    want_correct: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, entropy, correct), each summed over the rows whose target is not -100.

    loss = ``-log p_target`` (with smoothing s: ``(1 - s)`` of it plus s times the mean of ``-log p``) of
    ``p = softmax(z)``, ``z = multiplier * logits``, then ``softcap * tanh(z / softcap)``. With ``want_grad``, logits
    become ``scale * dloss/dlogits``, zero in ignored rows; otherwise they stay.

    logits (C, V); targets (C,) int64 -> loss float64 (); entropy ``-sum p log p`` float64 (), or None; correct int64 (),
    the rows whose first largest logit is the target, or None.

    Raises:
        QuantizationError: RW621, a target is neither -100 nor in [0, V).
    """
    options = (scale, label_smoothing, softcap, multiplier, want_grad, want_entropy, want_correct)
    if _traced(logits):
        loss, entropy, correct = torch.ops.rankwise.cross_entropy_(logits, targets, *options)
        return loss, entropy if want_entropy else None, correct if want_correct else None
    return run_cross_entropy_(logits, targets, *options)


def run_cross_entropy_(
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
    return _module(logits).cross_entropy_(  # type: ignore[no-any-return]
        logits, targets, scale, label_smoothing, softcap, multiplier, want_grad, want_entropy, want_correct
    )


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """``x * mask / (1 - p)``; the mask is a hash of (seed, flat index), so no one has to keep it.

    x of any shape, 0 <= p < 1, any integer seed (its low 64 bits count) -> as x, contiguous. The mask depends on the
    number of elements before an element, not on the shape.
    """
    if _traced(x):
        return torch.ops.rankwise.dropout(x, p, seed)  # type: ignore[no-any-return]
    return run_dropout(x, p, seed)


def run_dropout(x: Tensor, p: float, seed: int) -> Tensor:
    checks.dropout(x, x, p)
    return _module(x).dropout(x, p, seed)  # type: ignore[no-any-return]


def dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> Tensor:
    """``dx <- dx + z * mask / (1 - p)`` in place, with the mask of `dropout`: dx and z of one shape and dtype."""
    if _traced(dx):
        torch.ops.rankwise.dropout_add_(dx, z, p, seed)
        return dx
    return run_dropout_add_(dx, z, p, seed)


def run_dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> Tensor:
    checks.dropout(dx, z, p)
    return _module(dx).dropout_add_(dx, z, p, seed)  # type: ignore[no-any-return]


def _traced(tensor: Tensor) -> bool:
    """Whether the call must go through PyTorch's dispatcher."""
    return type(tensor) not in _PLAIN or torch.compiler.is_compiling()


def _module(tensor: Tensor) -> ModuleType:
    """The module whose functions run on ``tensor``."""
    if tensor.is_cpu and tensor.dtype in _NATIVE and selection.native_on_cpu():
        from rankwise.ops.cpu import training

        return training
    return reference_training


__all__ = [
    "ACTIVATIONS",
    "cross_entropy_",
    "dropout",
    "dropout_add_",
    "glu",
    "glu_backward",
    "low_rank_add_",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_",
    "scaled_grad",
]
