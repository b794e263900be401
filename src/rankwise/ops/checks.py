"""Checks of arguments before kernels for 4-bit weights or attention get pointers: types, dtypes, shapes, buffer sizes.

A function with the name of an operator checks all of its arguments. Legend: K = in features, N = out features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.constants import BLOCK_SIZES, NESTED_BLOCK
from rankwise.errors import QuantizationError
from rankwise.ops.codes import QUANT_TYPES
from rankwise.ops.packed_weight import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_type(quant_type: str, block_size: int) -> None:
    """Raise QuantizationError RW615 for a format that does not exist."""
    if quant_type not in QUANT_TYPES:
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
    check_type(quant_type, block_size)
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
    """Raise QuantizationError RW606, all mismatches at once, unless the arguments fit together."""
    good = q.dim() == k.dim() == 4 and k.shape == v.shape and q.dtype == k.dtype == v.dtype
    good = good and q.device == k.device == v.device and q.is_floating_point()
    good = good and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    good = good and q.shape[3] > 0 and k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0
    for bound in (start, end):
        is_bound = bound is None or (bound.shape == q.shape[:2] and bound.dtype is torch.int32)
        good = good and is_bound and (bound is None or bound.device == q.device)
    if not good:
        named = {"q": q, "k": k, "v": v, "start": start, "end": end}
        found = ", ".join(
            f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in named.items() if x is not None
        )
        raise QuantizationError(
            "RW606",
            "attention needs q (B, Lq, H, D), k and v (B, Lk, Hkv, D) of one dtype, H a multiple of Hkv, start and end "
            f"(B, Lq) int32, all on one device; it got {found}.",
        )


def check_weight(weight: PackedWeight) -> None:
    """Raise QuantizationError RW606, all mismatches at once, unless the tensors hold a weight of that shape."""
    check_type(weight.quant_type, weight.block_size)
    codes, absmax, shape, _, block_size, nested_absmax, offset = weight.parts
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
        raise _mismatch(weight)


def check_absmax(absmax: Tensor) -> None:
    """Raise QuantizationError RW606 or RW605 unless ``absmax`` is float32 (blocks,)."""
    if absmax.dtype is not torch.float32:
        raise QuantizationError("RW605", f"absmax is {absmax.dtype}: double quantization takes float32.")
    if absmax.dim() != 1:
        shape = tuple(absmax.shape)
        raise QuantizationError("RW606", f"absmax has shape {shape}: double quantization takes (blocks,).")


def check_codes(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> None:
    """Raise QuantizationError RW606, all mismatches at once, unless these are double-quantized scales (blocks,)."""
    nested = -(-codes.numel() // NESTED_BLOCK)
    wanted = ((codes, "codes", codes.numel(), torch.uint8), (nested_absmax, "nested_absmax", nested, torch.float32))
    faults = [
        f"{name} should hold {count} elements of {dtype} and {_describe(tensor)}"
        for tensor, name, count, dtype in (*wanted, (offset, "offset", 1, torch.float32))
        if tensor.numel() != count or tensor.dtype is not dtype
    ]
    if codes.dim() != 1:
        faults.append(f"codes has shape {tuple(codes.shape)} where (blocks,) belongs")
    if not codes.device == nested_absmax.device == offset.device:
        faults.append("they are on different devices")
    if faults:
        raise QuantizationError("RW606", f"these are not double-quantized scales: {'; '.join(faults)}.")


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


def _mismatch(weight: PackedWeight) -> QuantizationError:
    shape, block_size = weight.shape, weight.block_size
    n = math.prod(shape)
    blocks = -(-n // block_size)
    nested = weight.nested_absmax is not None or weight.offset is not None
    wanted = {"packed": ((n + 1) // 2, torch.uint8), "absmax": (blocks, torch.uint8 if nested else torch.float32)}
    if nested:
        wanted |= {"nested_absmax": (-(-blocks // NESTED_BLOCK), torch.float32), "offset": (1, torch.float32)}
    found = {
        "packed": weight.codes,
        "absmax": weight.absmax,
        "nested_absmax": weight.nested_absmax,
        "offset": weight.offset,
    }
    faults = [
        f"{name} should hold {count} elements of {dtype} and {_describe(found[name])}"
        for name, (count, dtype) in wanted.items()
        if _describe(found[name]) != f"holds {count} of {dtype}"
    ]
    if min(shape, default=0) < 0:
        faults.append("the shape is negative")
    devices = {str(tensor.device) for tensor in found.values() if tensor is not None}
    if len(devices) > 1:
        faults.append(f"the buffers are on different devices ({', '.join(sorted(devices))})")
    return QuantizationError(
        "RW606",
        f"the buffers do not hold a 4-bit weight of shape {tuple(shape)} in blocks of {block_size}: "
        f"{'; '.join(faults)}. The checkpoint is truncated or its parts belong to different weights.",
    )


def _describe(tensor: Tensor | None) -> str:
    return "is missing" if tensor is None else f"holds {tensor.numel()} of {tensor.dtype}"
