"""4-bit operators in Triton, with the signatures of `rankwise.ops.reference` and the same results.

Quantized and dequantized values equal the reference to the bit. Products use the same dequantized weight and sum in
float32. The callers in ``rankwise.ops.table`` have checked types, shapes and buffer sizes.

Up to 16 rows, products read the packed weight only. With more rows, the weight is dequantized temporarily and torch
multiplies, which costs less than tensor cores that wait for decoding. The input gradient dequantizes again, so no dense
weight is kept for backward. Weights whose rows are not whole blocks are always dequantized.

Legend: T = rows of x, K = in features, N = out features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rankwise.ops import reference
from rankwise.ops.packed_weight import PackedWeight, packed_shape
from rankwise.ops.reference import dequantize_absmax, quantize_absmax
from rankwise.ops.triton import dequantize, product, quantize, row_cross, row_norms


def quantize_4bit(w: Tensor, quant_type: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """w, any shape -> packed uint8 (`packed_shape`), absmax float32 (blocks,)."""
    flat, n = w.detach().contiguous().view(-1), w.numel()
    packed = w.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = w.new_empty(math.ceil(n / block_size), dtype=torch.float32)
    whole = n // block_size * block_size
    quantize.quantize_blocks(flat[:whole], packed, absmax, quant_type, block_size)
    rest = flat[whole:]
    if not (absmax[: whole // block_size].isfinite().all() and rest.isfinite().all()):
        raise reference.not_finite(w)
    if whole < n:
        # The last, partial block is divided by its absmax, not multiplied by the reciprocal; there is only one.
        packed[whole // 2 :], absmax[whole // block_size :] = _quantize_rest(rest, quant_type, block_size)
    return packed.view(packed_shape(w.shape, block_size)), absmax


def _quantize_rest(rest: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    packed, absmax = reference.quantize_4bit(rest, quant_type, block_size)
    return packed.view(-1), absmax


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """W' = value[code] * absmax, in ``dtype``."""
    return dequantize.dequantize(weight, dtype)


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W'^T + b, with W' rounded to the dtype of x. x (..., K) -> y (..., N)."""
    if math.prod(x.shape[:-1]) <= product.FEW_ROWS and weight.rows_are_blocks:
        return product.few_rows(x, weight, bias)
    return functional.linear(x, dequantize_4bit(weight, x.dtype), bias)


def linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """dL/dx = dL/dy W'. grad (..., N) -> (..., K)."""
    return grad @ dequantize_4bit(weight, grad.dtype)


def row_norms_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """||W'_n||, float32 (N,), of W' rounded to ``dtype`` and accumulated in float32."""
    if weight.rows_are_blocks:
        return row_norms.row_norms(weight, dtype)
    return torch.linalg.vector_norm(dequantize_4bit(weight, dtype), dim=1, dtype=torch.float32)


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """cross_n = <W'_n A^T, B_n>, float32 (N,), of W' rounded to ``dtype``."""
    if weight.rows_are_blocks:
        return row_cross.row_cross_4bit(weight, A, B, dtype)
    return row_cross.row_cross(dequantize_4bit(weight, dtype), A, B)


__all__ = [
    "dequantize_4bit",
    "dequantize_absmax",
    "linear_4bit",
    "linear_4bit_input_grad",
    "quantize_4bit",
    "quantize_absmax",
    "row_cross_4bit",
    "row_norms_4bit",
]
