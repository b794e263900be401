"""The public 4-bit functions.

Legend: T = rows of x, K = in features, N = out features, n = N K; blocks = ceil(n / block_size). A 4-bit weight is a
`PackedWeight`; ``quantize_4bit`` and ``dequantize_4bit`` take and give its tensors one by one, as bitsandbytes does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rankwise.compat.torch import has_tangents, is_watched
from rankwise.ops import table
from rankwise.ops.checks import check_rows
from rankwise.ops.packed_weight import PackedWeight, code_values
from rankwise.ops.selection import as_autocast, transforms_functions

_ops = torch.ops.rankwise

# Called before every product of a few rows; with cold caches, attribute lookups take microseconds.
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


def quantize_weight(
    w: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = False
) -> PackedWeight:
    """``w`` of any shape in 4 bits, its scales too in 8 bits with ``double_quant``. Errors: see `quantize_4bit`."""
    codes, absmax = quantize_4bit(w.detach(), quant_type, block_size)
    nested_absmax = offset = None
    if double_quant:
        absmax, nested_absmax, offset = quantize_absmax(absmax)
    return PackedWeight(
        codes=codes,
        absmax=absmax,
        shape=tuple(w.shape),
        quant_type=quant_type,
        block_size=block_size,
        nested_absmax=nested_absmax,
        offset=offset,
        dtype=w.dtype,
    )


def dequantize_weight(weight: PackedWeight, dtype: torch.dtype | None = None, gain: Tensor | None = None) -> Tensor:
    """W' = value[code] * absmax in float32, rounded to ``dtype`` or the weight's own; a new tensor of its shape.

    With ``gain`` (N,) float32, each row of W' (N, K) is multiplied by its gain before it is rounded.

    Raises:
        QuantizationError: RW605, RW615, and RW606 when the tensors do not hold a weight of that shape.
    """
    dtype = dtype or weight.dtype
    name, more = ("dequantize_4bit", (dtype,)) if gain is None else ("dequantize_gained_4bit", (gain, dtype))
    if _nothing_watches(weight.codes, weight.absmax, weight.nested_absmax, weight.offset):
        return table.run(name, weight, *more)
    return getattr(_ops, name)(*weight.parts, *more)


def quantize_4bit(w: Tensor, quant_type: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize to 4-bit codes with one scale per block (QLoRA, section 3; equal to bitsandbytes bit for bit).

    Args:
        w: any shape, float32, bfloat16 or float16.
        quant_type: ``"nf4"`` or ``"fp4"``.
        block_size: elements per block along the row-major flattening, a power of two from 32 to 4096.

    Returns:
        packed uint8, first element in the high nibble: (N, K / 2) when w is (N, K) and K a multiple of the block,
        else (ceil(n / 2), 1); and absmax float32 (blocks,).

    Raises:
        QuantizationError: RW615 unknown type or bad block size, RW603 NaN or Inf in w, RW605 bad dtype.
    """
    return _ops.quantize_4bit(w, quant_type, block_size)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str = "nf4",
    block_size: int = 64,
    *,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """`dequantize_weight` of the weight that these tensors make; a tensor of ``shape`` and ``dtype``."""
    return dequantize_weight(
        PackedWeight(
            codes=packed,
            absmax=absmax,
            shape=shape,
            quant_type=quant_type,
            block_size=block_size,
            nested_absmax=nested_absmax,
            offset=offset,
        ),
        dtype,
    )


def quantize_q4_0(w: Tensor) -> PackedWeight:
    """``w`` (N, K), K a multiple of 32, as llama.cpp's Q4_0: the element of the largest magnitude in a block of 32 is
    exact, and its sign is that of the scale.

    Scales are rounded to bfloat16, so that the values in a file of any dtype give these codes and scales again.
    """
    blocks = w.detach().float().view(-1, 32)
    sign = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).sign()
    codes, absmax = quantize_4bit((blocks * sign).view(w.shape), "q4_0", 32)
    scale = absmax.bfloat16().float() * sign[:, 0]
    return PackedWeight(
        codes=codes, absmax=scale, shape=tuple(w.shape), quant_type="q4_0", block_size=32, dtype=w.dtype
    )


# Elements of W' that `spread_weight` makes at a time.
_SPREAD = 1 << 22


def spread_weight(weight: PackedWeight) -> Tensor:
    """W' in NF4 with each element at a random place among those that round to its code, the same at each call.

    Rounding gives W' back. Of W' itself, which lies on the codes, rounding would also take back any small change; of
    this weight, as of one before quantization, it keeps the change on average. The outermost codes stay where they are,
    since they give the scale.
    """
    table, device = code_values("nf4", weight.codes.device), weight.codes.device
    middle = (table[1:] + table[:-1]) / 2
    low, high = torch.cat([table[:1], middle[:-1], table[-1:]]), torch.cat([table[:1], middle[1:], table[-1:]])
    absmax = weight.absmax
    if weight.nested_absmax is not None and weight.offset is not None:
        absmax = dequantize_absmax(absmax, weight.nested_absmax, weight.offset)
    out = torch.empty(weight.elements, device=device)
    generator = torch.Generator().manual_seed(0)
    codes = weight.codes.view(-1)
    for start in range(0, weight.elements, _SPREAD):
        part = out[start : start + _SPREAD]
        pair = codes[start // 2 : (start + _SPREAD) // 2]
        index = torch.stack([pair >> 4, pair & 15], dim=1).view(-1)[: len(part)].int()
        place = torch.rand(len(part), generator=generator).to(device) * 0.998 + 0.001
        torch.lerp(low[index], high[index], place, out=part)
        scales = absmax[start // weight.block_size : (start + _SPREAD) // weight.block_size]
        part *= scales.repeat_interleave(weight.block_size)[: len(part)]
    return out.view(*weight.shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: absmax float32 (blocks,) -> codes uint8 (blocks,), nested_absmax float32, offset float32 ().

    absmax' = dynamic_map[codes] * nested_absmax + offset, with one nested_absmax per 256 blocks (QLoRA, section 3).

    Raises:
        QuantizationError: RW606 a different shape, RW605 a different dtype.
    """
    return _ops.quantize_absmax(absmax)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """The float32 (blocks,) scales of a double-quantized weight.

    Raises:
        QuantizationError: RW606 when the buffers do not belong together.
    """
    return _ops.dequantize_absmax(codes, nested_absmax, offset)


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W'^T + b, with W' rounded to the dtype of x. x (..., K) -> y (..., N), in the dtype of x.

    Differentiable in x and bias; backward keeps the weight's tensors and no dense weight. Under autocast x is cast as
    for ``functional.linear``. A bias of a different dtype is cast to that of x.

    Raises:
        QuantizationError: RW605, RW615, and RW606 when x, bias and weight do not fit together.
    """
    x = as_autocast(x)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    # The dispatcher and its autograd wrapper take 8 us, 10 to 50 % of a single-row product, so they are bypassed where
    # they are not needed.
    if _nothing_watches(x, weight.codes, bias):
        return table.run("linear_4bit", x, weight, bias)
    if _transformed():
        check_rows(x, weight.shape, 1, weight.codes.device)
        return functional.linear(x, _ops.dequantize_4bit(*weight.parts, x.dtype), bias)
    return _ops.linear_4bit.default(x, *weight.parts, bias)


def linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """dx = dy W', with W' rounded to the dtype of dy. dy (..., N) -> dx (..., K), in the dtype of dy.

    Raises:
        QuantizationError: RW605, RW615, and RW606 when dy and weight do not fit together.
    """
    if _transformed():
        check_rows(grad, weight.shape, 0, weight.codes.device)
        return grad @ _ops.dequantize_4bit(*weight.parts, grad.dtype)
    return _ops.linear_4bit_input_grad(grad, *weight.parts)


def row_norms_4bit(weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """||W'_n|| over K, float32 (N,), of W' rounded to ``dtype`` or the weight's own; the sum is kept in float32.

    Raises:
        QuantizationError: RW605, RW615, and RW606 when the weight is not a matrix (N, K).
    """
    return _ops.row_norms_4bit(*weight.parts, dtype or weight.dtype)


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """<W'_n A^T, B_n> for A (R, K) and B (N, R), float32 (N,), of W' rounded to ``dtype`` or the weight's own. No dense
    W' is made where its rows are whole blocks.

    Raises:
        QuantizationError: RW605, RW615, and RW606 when A, B and weight do not fit together.
    """
    dtype = dtype or weight.dtype
    # Called at every optimizer step for every layer: past the dispatcher where nothing traces.
    if type(weight.codes) in table.PLAIN and not _is_compiling():
        return table.run("row_cross_4bit", weight, A, B, dtype)
    return _ops.row_cross_4bit(*weight.parts, A, B, dtype)


def adapted_gain_4bit(weight: PackedWeight, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    """`rankwise.ops.elementwise.adapted_gain` of W' in the weight's dtype.

    Raises:
        QuantizationError: RW605, RW615, and RW606 when the arguments do not fit together.
    """
    if _nothing_watches(weight.codes, squared):
        return table.run("adapted_gain_4bit", weight, squared, A, B, m, scale, weight.dtype)
    return _ops.adapted_gain_4bit(*weight.parts, squared, A, B, m, scale, weight.dtype)


def _transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is active.

    The operators of products only have gradients: they would refuse the first and silently give the second no tangent.
    """
    if _is_compiling():
        return False
    return transforms_functions() or has_tangents()


def _nothing_watches(*tensors: Tensor | None) -> bool:
    """Whether no gradient, compiler, tracer, fake mode, functional transform or tensor subclass needs to see
    operations on these tensors.
    """
    if is_watched():
        return False
    with_grad = _is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in table.PLAIN or (with_grad and tensor.requires_grad)):
            return False
    return True
