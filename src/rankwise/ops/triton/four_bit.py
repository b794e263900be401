"""Four bits on Triton kernels, with the signatures of `rankwise.ops.reference` and the same results.

Quantized and dequantized values equal the reference to the bit. Products use the same dequantized weight and sum in
float32. The callers in ``rankwise.ops.library`` have checked types, shapes and buffer sizes.

Up to 16 rows, products read the packed weight only. Larger ones dequantize it, for the time of one product, and leave
the product to torch, which then costs less than tensor cores that wait for decoding. So does the input gradient, which
dequantizes again: no dense weight is kept for backward. Weights whose rows are not whole blocks always take that way.

Legend: T = rows of x, K = in features, N = out features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rankwise.ops import reference
from rankwise.ops.reference import dequantize_absmax, packed_shape, quantize_absmax
from rankwise.ops.triton import dequantize, product, quantize, row_norms
from rankwise.ops.triton.tile import rows_are_blocks, weight


def quantize_4bit(w: Tensor, quant_type: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """w, any shape -> packed uint8 (`rankwise.ops.packed_shape`), absmax float32 (blocks,)."""
    flat, n = w.detach().contiguous().view(-1), w.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(math.ceil(n / block_size), dtype=torch.float32, device=w.device)
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


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str = "nf4",
    block_size: int = 64,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """w' = value[code] * absmax, of ``shape`` and ``dtype``."""
    return dequantize.dequantize(weight(packed, absmax, nested_absmax, offset, quant_type), shape, dtype, block_size)


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    bias: Tensor | None = None,
    quant_type: str = "nf4",
    block_size: int = 64,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """y = x W'^T + b, with W' rounded to the dtype of x. x (..., K) -> y (..., N)."""
    N, K = shape
    if math.prod(x.shape[:-1]) <= product.FEW_ROWS and rows_are_blocks(K, block_size):
        buffers = weight(packed, absmax, nested_absmax, offset, quant_type)
        return product.few_rows(x, buffers, N, bias, block_size)
    dense = dequantize_4bit(packed, absmax, shape, x.dtype, quant_type, block_size, nested_absmax, offset)
    return functional.linear(x, dense, bias)


def linear_4bit_input_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    quant_type: str = "nf4",
    block_size: int = 64,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """dL/dx = dL/dy W'. grad (..., N) -> (..., K)."""
    return grad @ dequantize_4bit(packed, absmax, shape, grad.dtype, quant_type, block_size, nested_absmax, offset)


def row_norms_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    quant_type: str = "nf4",
    block_size: int = 64,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """||W'_n||, float32 (N,), of W' rounded to ``dtype`` and accumulated in float32."""
    N, K = shape
    if rows_are_blocks(K, block_size):
        buffers = weight(packed, absmax, nested_absmax, offset, quant_type)
        return row_norms.row_norms(buffers, N, K, block_size, dtype)
    dense = dequantize_4bit(packed, absmax, shape, dtype, quant_type, block_size, nested_absmax, offset)
    return torch.linalg.vector_norm(dense, dim=1, dtype=torch.float32)


__all__ = [
    "dequantize_4bit",
    "dequantize_absmax",
    "linear_4bit",
    "linear_4bit_input_grad",
    "quantize_4bit",
    "quantize_absmax",
    "row_norms_4bit",
]
