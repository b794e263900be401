"""Checks of arguments before kernels get pointers: types, dtypes, shapes, buffer sizes.

A function with the name of an operator checks all of its arguments. Legend: T = rows (all leading dimensions together),
K = in features, N = out features, D = columns, R = rank, V = vocabulary, C = rows with logits; B, H, L = batch, heads,
positions. Failures of element-wise operators raise RW606, bad targets RW621.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from rankwise.constants import BLOCK_SIZES, MXFP4, NESTED_BLOCK
from rankwise.errors import QuantizationError
from rankwise.ops.gguf_blocks import BLOCK_TYPES
from rankwise.ops.packed_weight import PACKED_TYPES, QUANT_TYPES, PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_type(quant_type: str, block_size: int, types: Collection[str] = (*PACKED_TYPES, *BLOCK_TYPES)) -> None:
    """Raise QuantizationError RW615 for a format that does not exist, or that is none of ``types``."""
    if quant_type not in types:
        raise QuantizationError("RW615", f"there is no 4-bit type {quant_type!r}: use one of {', '.join(QUANT_TYPES)}.")
    if block_size not in BLOCK_SIZES:
        raise QuantizationError(
            "RW615",
            f"the block size is {block_size!r}: use a power of two "
            f"from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]} (64 is usual).",
        )


def check_dtype(dtype: torch.dtype, what: str) -> None:
    """Raise QuantizationError RW605 unless ``dtype`` is one that the kernels compute in."""
    if dtype not in DTYPES:
        raise QuantizationError("RW605", f"{what} is {dtype}: convert it to float32, bfloat16 or float16 first.")


def quantize_4bit(w: Tensor, quant_type: str, block_size: int) -> None:
    check_type(quant_type, block_size, PACKED_TYPES)
    check_dtype(w.dtype, "the weight")


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> None:
    check_weight(weight)
    check_dtype(dtype, "the dtype asked for")


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    check_weight(weight)
    check_rows(x, weight.shape, 1, weight.codes.device)
    check_bias(bias, x, weight.shape)


def linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> None:
    check_weight(weight)
    check_rows(grad, weight.shape, 0, weight.codes.device)


def row_norms_4bit(weight: PackedWeight, dtype: torch.dtype) -> None:
    check_matrix(weight.shape)
    dequantize_4bit(weight, dtype)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, scale: float | None
) -> None:
    """Raise QuantizationError RW606 unless the arguments fit together."""
    good = q.dim() == k.dim() == 4 and k.shape == v.shape and q.dtype == k.dtype == v.dtype
    good = good and q.device == k.device == v.device and q.is_floating_point()
    good = good and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    good = good and q.shape[3] > 0 and k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0
    given = [bound for bound in (start, end) if bound is not None]
    for bound in given:
        # One range, or R of them.
        is_bound = bound.dim() in (2, 3) and (bound.shape[0], bound.shape[-1]) == q.shape[:2]
        good = good and is_bound and bound.dtype is torch.int32 and bound.device == q.device
        good = good and bound.shape == given[0].shape and (bound.dim() == 2 or (len(given) == 2 and bound.shape[1] > 0))
    if not good:
        needs = (
            "q (B, Lq, H, D), k and v (B, Lk, Hkv, D) of one dtype, H a multiple of Hkv, start and end (B, Lq) or "
            "both (B, R, Lq) int32"
        )
        raise _misfit(f"attention needs {needs}", q=q, k=k, v=v, start=start, end=end)


def check_weight(weight: PackedWeight) -> None:
    """Raise QuantizationError RW606 unless the tensors hold a weight of that shape."""
    check_type(weight.quant_type, weight.block_size)
    if weight.in_file_blocks:
        _check_blocks(weight)
        return
    codes, absmax, shape, _, block_size, nested_absmax, offset, _ = weight.parts
    n = math.prod(shape)
    blocks = -(-n // block_size)
    good = codes.dtype is torch.uint8 and codes.numel() == (n + 1) // 2 and absmax.numel() == blocks
    good = good and absmax.device == codes.device and min(shape, default=0) >= 0
    if nested_absmax is None and offset is None:
        good = good and absmax.dtype is torch.float32
    elif nested_absmax is not None and offset is not None:
        good = good and absmax.dtype is torch.uint8 and offset.numel() == 1 and offset.dtype is torch.float32
        good = good and nested_absmax.dtype is torch.float32 and nested_absmax.numel() == -(-blocks // NESTED_BLOCK)
        good = good and nested_absmax.device == offset.device == codes.device
    else:
        good = False
    if not good:
        raise _misfit(
            f"the buffers do not hold a 4-bit weight of shape {tuple(shape)}: in blocks of {block_size} it needs "
            f"{(n + 1) // 2} codes in uint8 and {blocks} scales in float32, or in uint8 with those of blocks of "
            f"{NESTED_BLOCK} of them",
            codes=codes, absmax=absmax, nested_absmax=nested_absmax, offset=offset,
        )  # fmt: skip


def _check_blocks(weight: PackedWeight) -> None:
    """The numbers in ``order`` are not checked, since the loader makes them."""
    codes, shape, order, kind = weight.codes, weight.shape, weight.order, BLOCK_TYPES[weight.quant_type]
    good = len(shape) == 2 and codes.dtype is torch.uint8 and weight.block_size == kind.elements
    good = good and shape[1] % kind.elements == 0
    if order is None or codes.dim() != 1:
        good = good and codes.dim() == 2 and codes.shape[1] == kind.row_bytes(shape[1])
    exponents = math.prod(shape) // kind.elements if weight.quant_type == MXFP4 else 0
    good = good and weight.absmax.numel() == exponents and (not exponents or weight.absmax.dtype is torch.uint8)
    if order is None:
        good = good and codes.shape[0] == shape[0]
    else:
        good = good and order.dtype is torch.int32 and tuple(order.shape) == tuple(shape[:1])
    if not good or codes.device.type not in ("cpu", "meta"):
        raise _misfit(
            f"a weight of shape {tuple(shape)} in a file's {weight.quant_type} needs uint8 rows of whole blocks of "
            f"{kind.elements} on a CPU, {exponents} exponents in uint8, and an int32 order of its rows or none",
            codes=codes, exponents=weight.absmax, order=order,
        )  # fmt: skip


def check_absmax(absmax: Tensor) -> None:
    """Raise QuantizationError RW606 or RW605 unless ``absmax`` is float32 (blocks,)."""
    if absmax.dtype is not torch.float32:
        raise QuantizationError("RW605", f"absmax is {absmax.dtype}: double quantization takes float32.")
    if absmax.dim() != 1:
        shape = tuple(absmax.shape)
        raise QuantizationError("RW606", f"absmax has shape {shape}: double quantization takes (blocks,).")


def check_codes(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> None:
    """Raise QuantizationError RW606 unless these are double-quantized scales (blocks,)."""
    nested = -(-codes.numel() // NESTED_BLOCK)
    good = codes.dim() == 1 and codes.dtype is torch.uint8 and (nested_absmax.numel(), offset.numel()) == (nested, 1)
    good = good and nested_absmax.dtype is offset.dtype is torch.float32
    if not good or not codes.device == nested_absmax.device == offset.device:
        raise _misfit(
            f"double-quantized scales are codes (blocks,) in uint8, a float32 scale for {NESTED_BLOCK} of them and an "
            "offset",
            codes=codes, nested_absmax=nested_absmax, offset=offset,
        )  # fmt: skip


def check_matrix(shape: Sequence[int]) -> None:
    """Raise QuantizationError RW606 unless ``shape`` is (N, K)."""
    if len(shape) != 2:
        raise QuantizationError(
            "RW606", f"the weight has shape {tuple(shape)}: a product needs two dimensions, (out, in)."
        )


def check_rows(x: Tensor, shape: Sequence[int], dimension: int, device: torch.device) -> None:
    """Raise QuantizationError RW606 unless the last dimension of ``x`` is ``shape[dimension]`` of a (N, K) weight."""
    check_matrix(shape)
    check_dtype(x.dtype, "the input of a 4-bit product")
    if x.dim() == 0 or x.shape[-1] != shape[dimension] or x.device != device:
        raise QuantizationError(
            "RW606",
            f"an input of shape {tuple(x.shape)} on {x.device} does not fit a weight of shape {tuple(shape)} "
            f"on {device}: its last dimension must be {shape[dimension]}, on the same device.",
        )


def check_bias(bias: Tensor | None, x: Tensor, shape: Sequence[int]) -> None:
    """Raise QuantizationError RW606 unless ``bias`` is absent or (N,) of the dtype and device of ``x``."""
    if bias is None or (bias.shape == (shape[0],) and bias.dtype == x.dtype and bias.device == x.device):
        return
    raise QuantizationError(
        "RW606",
        f"a bias of shape {tuple(bias.shape)}, {bias.dtype} on {bias.device} does not fit: "
        f"it must be ({shape[0]},), {x.dtype} on {x.device}.",
    )


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


def glu(gate: Tensor, up: Tensor, act: str, dout: Tensor | None = None) -> None:
    if act not in ACTIVATIONS:
        raise QuantizationError("RW606", f"there is no activation {act!r}: use one of {', '.join(ACTIVATIONS)}.")
    if gate.dim() == 0 or not _same(gate, up) or (dout is not None and not _same(gate, dout)):
        raise _misfit("glu needs tensors of one shape (T, N) and dtype", gate=gate, up=up, dout=dout)


def glu_backward(dout: Tensor, gate: Tensor, up: Tensor, act: str, want_product: bool) -> None:
    glu(gate, up, act, dout)


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
    """Raise QuantizationError (RW621) for a target outside [0, V) that is not ``ignored``; waits for a GPU."""
    bad = ((targets < 0) & (targets != ignored)) | (targets >= vocabulary)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise QuantizationError(
            "RW621",
            f"the target of row {row} is {int(targets[row])}: labels must be token numbers below the vocabulary's "
            f"size, {vocabulary}, or {ignored} if there is nothing to learn. Is the tokenizer that of this model?",
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
