"""Checks of arguments before an element-wise kernel of `rankwise.ops.elementwise` gets a pointer. Failures raise RW606,
bad targets RW621.

Legend: T = rows, N and D = columns, R = rank, V = vocabulary, C = rows with logits; B, H, L = batch, heads, positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.errors import QuantizationError
from rankwise.ops.checks import DTYPES, dequantize_4bit
from rankwise.ops.packed_weight import PackedWeight

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")

_DTYPES = (*DTYPES, torch.float64)


def low_rank_add_(y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None, bias: Tensor | None) -> None:
    if (
        y.dim() == 0
        or u.shape != (*y.shape[:-1], B.shape[-1])
        or B.shape != (y.shape[-1], u.shape[-1])
        or not _alike(y, u, B)
        or not _columns(y, g)
        or not _columns(y, bias)
    ):
        raise _misfit(
            "low_rank_add_ needs y (T, N), u (T, R), B (N, R) of one dtype and g, bias (N,)",
            y=y,
            u=u,
            B=B,
            g=g,
            bias=bias,
        )


def scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> None:
    if dy.dim() == 0 or not _columns(dy, g) or (y is not None and not _same(dy, y)):
        raise _misfit("scaled_grad needs dy and y (T, N) of one dtype and g (N,)", dy=dy, y=y, g=g)


def low_rank_grads_(
    dU: Tensor, dy: Tensor, U: Tensor, B: Tensor, scale: float, g: Tensor | None, folded: bool, y: Tensor | None,
    m: Tensor | None,
) -> None:  # fmt: skip
    T, N = dy.shape if dy.dim() == 2 else (-1, -1)
    good = dU.shape == U.shape and U.dim() == 2 and U.shape[0] == T and B.shape == (N, U.shape[1])
    good = good and _alike(dU, dy, U, B) and (y is None or _same(dy, y)) and _columns(dy, g) and _columns(dy, m)
    if not good or (folded and g is None):
        raise _misfit(
            "low_rank_grads_ needs dy and y (T, N), dU and U (T, R), B (N, R) of one dtype and g, m (N,)",
            dU=dU, dy=dy, U=U, B=B, g=g, y=y, m=m,
        )  # fmt: skip


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> None:
    if x.dim() == 0 or not _columns(x, w) or offset not in (0, 1):
        raise _misfit(f"rms_norm needs x (T, D), w (D,) and offset 0 or 1 (it got {offset})", x=x, w=w)


def rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int, residual_grad: Tensor | None
) -> None:
    rows = x.numel() // max(x.shape[-1], 1) if x.dim() else -1
    good = _same(dy, x) and (residual_grad is None or _same(dy, residual_grad))
    if not good or not _columns(x, w) or rstd.numel() != rows or rstd.device != x.device or offset not in (0, 1):
        raise _misfit(
            f"rms_norm_backward needs dy, x, residual_grad (T, D), w (D,), rstd (T,), offset 0 or 1 (it got {offset})",
            dy=dy,
            x=x,
            w=w,
            rstd=rstd,
            residual_grad=residual_grad,
        )


def glu(gate: Tensor, up: Tensor, act: str) -> None:
    _glu(gate, up, act, None)


def glu_backward(dout: Tensor, gate: Tensor, up: Tensor, act: str, want_product: bool) -> None:
    _glu(gate, up, act, dout)


def _glu(gate: Tensor, up: Tensor, act: str, dout: Tensor | None) -> None:
    if act not in ACTIVATIONS:
        raise QuantizationError("RW606", f"there is no activation {act!r}: use one of {', '.join(ACTIVATIONS)}.")
    if gate.dim() == 0 or not _same(gate, up) or (dout is not None and not _same(gate, dout)):
        raise _misfit("glu needs tensors of one shape (T, N) and dtype", gate=gate, up=up, dout=dout)


def rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    good = q.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and cos.dtype == sin.dtype
    good = good and cos.shape[0] in (1, q.shape[0]) and cos.shape[1] == q.shape[2] and cos.shape[2] <= q.shape[3]
    if not good or cos.shape[2] % 2 or not _supported(q, cos) or q.device != sin.device:
        raise _misfit("rope needs q (B, H, L, D), cos and sin (B or 1, L, D'), D' even, D' <= D", q=q, cos=cos, sin=sin)


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    label_smoothing: float,
    softcap: float | None,
    multiplier: float,
    *wanted: bool,
) -> None:
    good = logits.dim() == 2 and targets.shape == logits.shape[:1] and targets.dtype == torch.int64
    if not good or not _supported(logits, logits) or targets.device != logits.device or logits.shape[1] == 0:
        raise _misfit("cross_entropy_ needs logits (C, V) and targets (C,) int64", logits=logits, targets=targets)
    if not 0 <= label_smoothing <= 1 or not multiplier > 0 or (softcap is not None and not softcap > 0):
        raise QuantizationError(
            "RW606",
            f"cross_entropy_ needs a label smoothing in [0, 1], a softcap and a multiplier above 0; it got "
            f"{label_smoothing}, {softcap} and {multiplier}.",
        )


def dropout(x: Tensor, p: float, seed: int) -> None:
    dropout_add_(x, x, p, seed)


def dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> None:
    if not 0 <= p < 1:
        raise QuantizationError("RW606", f"dropout cannot drop with probability {p}: use a number in [0, 1).")
    if not _same(dx, z):
        raise _misfit("dropout_add_ needs dx and z of one shape and dtype", dx=dx, z=z)


def row_cross(W: Tensor, A: Tensor, B: Tensor) -> None:
    row_cross_of(W.shape, W.dtype, A, B, W.device)


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> None:
    dequantize_4bit(weight, dtype)
    row_cross_of(weight.shape, dtype, A, B, weight.codes.device)


def adapted_gain(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> None:
    row_cross(W, A, B)
    _per_row(W.shape[0], squared, m)


def adapted_gain_4bit(
    weight: PackedWeight, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float, dtype: torch.dtype
) -> None:
    row_cross_4bit(weight, A, B, dtype)
    _per_row(weight.shape[0], squared, m)


def dequantize_gained_4bit(weight: PackedWeight, gain: Tensor, dtype: torch.dtype) -> None:
    dequantize_4bit(weight, dtype)
    if len(weight.shape) != 2:
        raise _misfit(f"a gain needs a weight (N, K), not {tuple(weight.shape)}", gain=gain)
    _per_row(weight.shape[0], gain)


def _per_row(N: int, *vectors: Tensor) -> None:
    for vector in vectors:
        if vector.shape != (N,) or vector.dtype != torch.float32:
            raise _misfit(f"a float32 number is needed for each of {N} rows", given=vector)


def row_cross_of(shape: Sequence[int], dtype: torch.dtype, A: Tensor, B: Tensor, device: torch.device) -> None:
    good = len(shape) == 2 and A.dim() == 2 and B.dim() == 2 and dtype in _DTYPES
    good = good and A.shape[1] == shape[1] and B.shape == (shape[0], A.shape[0])
    if not good or not _supported(A, B) or A.device != device:
        weight = f"{tuple(shape)} {dtype} on {device}"
        raise _misfit(f"row_cross needs W (N, K) (it got {weight}), A (R, K) and B (N, R)", A=A, B=B)


def check_targets(targets: Tensor, vocabulary: int, ignored: int) -> None:
    """Raise QuantizationError (RW621) for a target outside [0, V) that is not ``ignored``; waits for a card."""
    wrong = bad_target(targets, vocabulary, ignored)
    if wrong is not None:
        raise wrong


def bad_target(targets: Tensor, vocabulary: int, ignored: int) -> QuantizationError | None:
    """The error that names the first target outside [0, V), or None."""
    bad = ((targets < 0) & (targets != ignored)) | (targets >= vocabulary)
    if not bad.any():
        return None
    row = int(bad.nonzero()[0])
    return QuantizationError(
        "RW621",
        f"the target of row {row} is {int(targets[row])}: labels must be token numbers below the vocabulary's size, "
        f"{vocabulary}, or {ignored} where there is nothing to learn. Is the tokenizer that of this model?",
    )


def _supported(x: Tensor, other: Tensor) -> bool:
    return x.dtype in _DTYPES and other.dtype in _DTYPES and x.device == other.device


def _alike(x: Tensor, *others: Tensor) -> bool:
    return x.dtype in _DTYPES and all(one.dtype == x.dtype and one.device == x.device for one in others)


def _same(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape and _alike(x, other)


def _columns(x: Tensor, vector: Tensor | None) -> bool:
    return vector is None or (vector.dim() == 1 and vector.shape[0] == x.shape[-1] and _supported(x, vector))


def _misfit(needs: str, **tensors: Tensor | None) -> QuantizationError:
    found = ", ".join(
        f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        for name, tensor in tensors.items()
        if tensor is not None
    )
    return QuantizationError("RW606", f"{needs}, all on one device; it got {found}.")


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums over many rows: float64, except on Apple's GPUs, which do not have it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
