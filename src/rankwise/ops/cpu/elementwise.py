"""The element-wise operators of a training step in the native library, with the signatures and the precision of
`rankwise.ops.reference`: float32 and bfloat16.

The callers in ``rankwise.ops.elementwise`` have checked types and shapes.

Legend: T = rows (all leading dimensions together), N and D = columns, R = rank, V = vocabulary, C = rows with logits;
B, H, L = batch, heads, positions.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, get_num_threads

from rankwise.constants import IGNORED
from rankwise.ops import reference as reference
from rankwise.ops.checks import ACTIVATIONS, check_targets
from rankwise.ops.cpu.native import DTYPE, OF_SHORT_LIVED, library, pointer, roomy
from rankwise.ops.reference import dropout_keys, dropout_threshold

_ACTIVATION = {name: number for number, name in enumerate(ACTIVATIONS)}


def low_rank_add_(y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None, bias: Tensor | None) -> Tensor:
    """y <- g * (y + scale * u B^T) + bias."""
    out, out_stride = _rows(y)
    u, u_stride = _rows(u)
    B, g, bias = B.contiguous(), _floats(g), _floats(bias)
    N, R = B.shape
    library().rw_low_rank_add(
        out.data_ptr(), out_stride, u.data_ptr(), u_stride, B.data_ptr(), scale, pointer(g), pointer(bias),
        _count(y, N), N, R, DTYPE[y.dtype], get_num_threads(),
    )  # fmt: skip
    return y if out is y else y.copy_(out)


def scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """dz = dy * g; dot_n = sum_t dy_tn y_tn."""
    dy, dy_stride = _rows(dy)
    rows, y_stride = (None, 0) if y is None else _rows(y)
    factor, N = g.float().contiguous(), g.shape[0]
    dz = torch.empty(dy.shape, dtype=dy.dtype)
    dot = None if y is None else torch.empty(N, dtype=torch.float32)
    library().rw_scaled_grad(
        dy.data_ptr(), dy_stride, pointer(rows), y_stride, factor.data_ptr(), dz.data_ptr(), pointer(dot),
        _count(dy, N), N, DTYPE[dy.dtype], get_num_threads(),
    )  # fmt: skip
    return dz, dot


def row_cross(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """cross_n = <W_n A^T, B_n>, float32 (N,)."""
    if not W.is_contiguous():
        # A transposed view, such as a Conv1D's weight, would need a copy of the whole weight.
        return reference.row_cross(W, A, B)
    A, B = A.float().contiguous(), B.float().contiguous()
    cross = torch.empty(W.shape[0], dtype=torch.float32)
    library().rw_row_cross(
        W.data_ptr(), A.data_ptr(), B.data_ptr(), cross.data_ptr(), *W.shape, A.shape[0], DTYPE[W.dtype],
        get_num_threads(),
    )  # fmt: skip
    return cross


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> tuple[Tensor, Tensor]:
    """rstd = 1 / sqrt(mean(x^2) + eps); y = (offset + w) * (x rstd), with x rstd rounded first where ``cast_first``."""
    x, x_stride = _rows(x)
    D = w.shape[0]
    w, T = w.to(x.dtype).contiguous(), _count(x, D)
    y, rstd = roomy(x.shape, x.dtype, OF_SHORT_LIVED), torch.empty(T, dtype=torch.float32)
    library().rw_rms_norm(
        x.data_ptr(), x_stride, w.data_ptr(), eps, offset, cast_first, y.data_ptr(), rstd.data_ptr(),
        T, D, DTYPE[x.dtype], get_num_threads(),
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int, residual_grad: Tensor | None
) -> Tensor:
    """h = dy (offset + w); dx = rstd (h - x rstd^2 mean(h x)) + residual_grad."""
    dy, dy_stride = _rows(dy)
    x, x_stride = _rows(x)
    residual, residual_stride = (None, 0) if residual_grad is None else _rows(residual_grad)
    w, rstd, D = w.to(x.dtype).contiguous(), rstd.float().contiguous(), w.shape[0]
    dx = torch.empty(x.shape, dtype=x.dtype)
    library().rw_rms_norm_backward(
        dy.data_ptr(), dy_stride, x.data_ptr(), x_stride, w.data_ptr(), rstd.data_ptr(), offset,
        pointer(residual), residual_stride, dx.data_ptr(), _count(x, D), D, DTYPE[x.dtype], get_num_threads(),
    )  # fmt: skip
    return dx


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up."""
    gate, gate_stride = _rows(gate)
    up, up_stride = _rows(up)
    product, N = roomy(gate.shape, gate.dtype, OF_SHORT_LIVED), gate.shape[-1]
    library().rw_glu(
        None, 0, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, _ACTIVATION[act],
        None, None, product.data_ptr(), _count(gate, N), N, DTYPE[gate.dtype], get_num_threads(),
    )  # fmt: skip
    return product


def glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, with_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dgate = dout up act'(gate); dup = dout act(gate); product = act(gate) up."""
    dout, dout_stride = _rows(dout)
    gate, gate_stride = _rows(gate)
    up, up_stride = _rows(up)
    shape, dtype, N = gate.shape, gate.dtype, gate.shape[-1]
    dgate, dup = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    product = torch.empty(shape, dtype=dtype) if with_product else None
    library().rw_glu(
        dout.data_ptr(), dout_stride, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, _ACTIVATION[act],
        dgate.data_ptr(), dup.data_ptr(), pointer(product), _count(gate, N), N, DTYPE[dtype], get_num_threads(),
    )  # fmt: skip
    return dgate, dup, product


def rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """(q_1 cos_1 - q_2 sin_1, q_2 cos_2 + q_1 sin_2) of the halves of the first D' columns; the others stay."""
    B, H, L, D = q.shape
    q = q if q.stride(3) == 1 or D < 2 else q.contiguous()
    out = torch.empty((B, L, H, D), dtype=q.dtype)
    _turn(q, cos, sin, inverse, out, (L * H * D, D, H * D))
    return out.transpose(1, 2)


def rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`rope` in place."""
    # For overlapping memory, copy_ raises PyTorch's own error.
    if q.stride(3) != 1 or 0 in q.stride():
        return q.copy_(rope(q, cos, sin, inverse))
    _turn(q, cos, sin, inverse, q, q.stride()[:3])
    return q


def _turn(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor, out_stride: tuple[int, ...]) -> None:
    if cos.dtype not in DTYPE:
        cos, sin = cos.float(), sin.float()
    cos, sin = cos.contiguous(), sin.contiguous()
    batches, L, rotary = cos.shape
    library().rw_rope(
        q.data_ptr(), _Strides(*q.stride()[:3]), cos.data_ptr(), sin.data_ptr(), 0 if batches == 1 else L * rotary,
        inverse, out.data_ptr(), _Strides(*out_stride), _Sizes(*q.shape, rotary),
        DTYPE[q.dtype], DTYPE[cos.dtype], get_num_threads(),
    )  # fmt: skip


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
    """See `rankwise.ops.reference.cross_entropy_`."""
    rows, stride = _rows(logits)
    targets, (C, V) = targets.contiguous(), logits.shape
    sums = (ctypes.c_double * 3)()
    wrong = library().rw_cross_entropy(
        rows.data_ptr(), stride, targets.data_ptr(), C, V, scale, label_smoothing, softcap or 0.0, multiplier,
        want_grad, want_entropy, want_correct, sums, DTYPE[logits.dtype], get_num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        check_targets(targets, V, IGNORED)
    if want_grad and rows is not logits:
        logits.copy_(rows)
    loss = torch.tensor(sums[0], dtype=torch.float64)
    entropy = torch.tensor(sums[1], dtype=torch.float64) if want_entropy else None
    return loss, entropy, torch.tensor(int(sums[2])) if want_correct else None


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """y_i = x_i / (1 - p) where the hash of (seed, i) is at least p 2^32, else 0."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    _drop(x, y, p, dropout_keys(seed), add=False)
    return y


def dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> Tensor:
    """dx_i <- dx_i + z_i / (1 - p) where `dropout` keeps."""
    out = dx.contiguous()
    _drop(z.contiguous(), out, p, dropout_keys(seed), add=True)
    return dx if out is dx else dx.copy_(out)


def _drop(z: Tensor, out: Tensor, p: float, keys: tuple[int, int], *, add: bool) -> None:
    library().rw_dropout(
        z.data_ptr(), out.data_ptr(), add, 1 / (1 - p), dropout_threshold(p), *keys,
        z.numel(), DTYPE[z.dtype], get_num_threads(),
    )  # fmt: skip


_Strides = ctypes.c_int64 * 3
_Sizes = ctypes.c_int64 * 5


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as rows of contiguous columns with one stride, and that stride: x itself if it has this layout."""
    columns = x.shape[-1]
    if x.is_contiguous():
        return x, columns
    stride = x.stride()
    distance = stride[-2] if len(stride) > 1 else 0
    regular = all(a == b * n for a, b, n in zip(stride[:-2], stride[1:-1], x.shape[1:-1]))
    if regular and stride[-1] == 1 and distance >= columns:
        return x, distance
    return x.contiguous(), columns


def _count(x: Tensor, columns: int) -> int:
    """The number of rows."""
    return x.numel() // columns if columns else 0


def _floats(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()
