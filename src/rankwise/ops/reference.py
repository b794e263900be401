"""4-bit weights in plain PyTorch: the specification that every other implementation equals.

Legend: w weight, n its elements in row-major order; b a block of ``block_size`` consecutive elements (the last may be
shorter); K = in features, N = out features, T = rows of x.

    absmax_b = max |w_i|, i in b
    code_i   = the nearest of 16 values to w_i / absmax_b       ties to the lower value
    packed_j = code_2j << 4 | code_2j+1
    w'_i     = value[code_i] * absmax_b                          in float32, then rounded to the dtype asked for

Double quantization stores absmax itself in 8 bits: offset = mean(absmax), and per block of 256
nested_absmax = max |absmax - offset|, so that absmax' = dynamic_map[code] * nested_absmax + offset.

Equal to bitsandbytes 0.50 on CPU bit for bit, except where bitsandbytes dequantizes wrongly (last dimension not a
multiple of the block). The public functions in ``rankwise.ops`` check the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rankwise.constants import NESTED_BLOCK
from rankwise.errors import QuantizationError
from rankwise.ops.codes import (
    DYNAMIC_BINS,
    code_bounds,
    code_order,
    code_values,
    dynamic_bins,
    dynamic_map,
)
from rankwise.ops.elementwise_reference import row_chunks, row_cross
from rankwise.ops.packed_weight import PackedWeight, packed_shape

# Number of elements processed at once: a multiple of every block size, so that temporaries take a few MB.
_CHUNK = 1 << 20

# The least absmax that is inverted; as in bitsandbytes, a partial last block also stores it.
_TINY = 1e-38


def quantize_4bit(w: Tensor, quant_type: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """w, any shape -> packed uint8 (`packed_shape`), absmax float32 (blocks,)."""
    flat, n = w.detach().reshape(-1), w.numel()
    packed = torch.empty(math.ceil(n / 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(math.ceil(n / block_size), dtype=torch.float32, device=w.device)
    for start in range(0, n, _CHUNK):
        chunk = flat[start : start + _CHUNK].float()
        codes, scales = _quantize_chunk(chunk, quant_type, block_size, start)
        packed[start // 2 : start // 2 + codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]
        absmax[start // block_size : start // block_size + scales.numel()] = scales
    return packed.view(packed_shape(w.shape, block_size)), absmax


def _quantize_chunk(w: Tensor, quant_type: str, block_size: int, start: int) -> tuple[Tensor, Tensor]:
    if not w.isfinite().all():
        raise not_finite(w, start)
    full = w.numel() // block_size * block_size
    blocks, rest = w[:full].view(-1, block_size), w[full:]
    absmax = blocks.abs().amax(dim=1)
    # As in bitsandbytes, full blocks are multiplied by the reciprocal, and a partial last block is divided.
    normal = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=_TINY)
        absmax, normal = torch.cat([absmax, last.view(1)]), torch.cat([normal, rest / last])
    if normal.numel() % 2:
        normal = functional.pad(normal, (0, 1))
    below = torch.bucketize(normal, code_bounds(quant_type, w.device), out_int32=True)
    return code_order(quant_type, w.device)[below], absmax


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """W' = value[code] * absmax, in ``dtype``."""
    n, values = weight.elements, code_values(weight.quant_type, weight.codes.device)
    scales = _scales(weight)
    out, flat = torch.empty(n, dtype=dtype, device=weight.codes.device), weight.codes.reshape(-1)
    for start in range(0, n, _CHUNK):
        count = min(_CHUNK, n - start)
        pairs = flat[start // 2 : (start + count + 1) // 2]
        codes = torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1)[:count]
        first = start // weight.block_size
        per_block = scales[first : first + math.ceil(count / weight.block_size)]
        out[start : start + count] = values[codes.int()] * per_block.repeat_interleave(weight.block_size)[:count]
    return out.view(tuple(weight.shape))


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax float32 (blocks,) -> codes uint8 (blocks,), nested_absmax float32 (ceil(blocks / 256),), offset float32
    ().

    The nearest 8-bit value is found through 65536 equal bins of [-1, 1], as bitsandbytes does on a CPU.
    """
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    if not offset.isfinite():
        # The sum of huge scales may overflow float32, their mean does not.
        offset = absmax.double().mean().float()
    count, blocks = absmax.numel(), math.ceil(absmax.numel() / NESTED_BLOCK)
    centred = functional.pad(absmax - offset, (0, blocks * NESTED_BLOCK - count)).view(blocks, NESTED_BLOCK)
    nested_absmax = centred.abs().amax(dim=1)
    normal = (centred * (1.0 / nested_absmax).unsqueeze(1)).clamp(-1, 1)
    bins = ((normal + 1.0) * 0.5 * (DYNAMIC_BINS - 1) + 0.5).nan_to_num(0.0).int()
    codes = dynamic_bins(absmax.device)[bins]
    codes[nested_absmax == 0.0] = 0
    return codes.view(-1)[:count].contiguous(), nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """absmax' = dynamic_map[codes] * nested_absmax + offset, float32 (blocks,)."""
    per_block = nested_absmax.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return dynamic_map(codes.device)[codes.int()] * per_block + offset


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W'^T + b, with W' rounded to the dtype of x. x (..., K) -> y (..., N)."""
    return functional.linear(x, dequantize_4bit(weight, x.dtype), bias)


def linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """dL/dx = dL/dy W'. grad (..., N) -> (..., K)."""
    return grad @ dequantize_4bit(weight, grad.dtype)


def row_norms_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """||W'_n||, float32 (N,), of W' rounded to ``dtype`` and accumulated in float32."""
    return torch.linalg.vector_norm(dequantize_4bit(weight, dtype), dim=1, dtype=torch.float32)


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """cross_n = <W'_n A^T, B_n>, float32 (N,), of W' rounded to ``dtype``."""
    return row_cross_in_chunks(weight, B, lambda part, B: row_cross(dequantize_4bit(part, dtype), A, B))


def row_cross_in_chunks(weight: PackedWeight, B: Tensor, cross: Callable[[PackedWeight, Tensor], Tensor]) -> Tensor:
    """The results of ``cross`` for chunks of the weight's rows and the same rows of B, concatenated."""
    if not weight.rows_are_blocks:
        return cross(weight, B)
    N, K = weight.shape
    codes, absmax = weight.codes.view(N, K // 2), _scales(weight).view(N, K // weight.block_size)
    sums = []
    for rows in row_chunks(N, K):
        shape = (rows.stop - rows.start, K)
        part = PackedWeight(codes[rows], absmax[rows].reshape(-1), shape, weight.quant_type, weight.block_size)
        sums.append(cross(part, B[rows]))
    return torch.cat(sums) if sums else B.new_empty(0, dtype=torch.float32)


def not_finite(w: Tensor, start: int = 0) -> QuantizationError:
    """The error that names the first NaN or Inf of ``w``, whose elements begin at flat index ``start``."""
    flat = w.reshape(-1)
    index = int((~flat.isfinite()).nonzero()[0])
    return QuantizationError(
        "RW603",
        f"the weight holds {flat[index].item()} at flat index {start + index}: 4 bits have no code for NaN or Inf. "
        "The checkpoint is damaged or the training that made it diverged; use another one.",
    )


def _scales(weight: PackedWeight) -> Tensor:
    if weight.nested_absmax is None or weight.offset is None:
        return weight.absmax
    return dequantize_absmax(weight.absmax, weight.nested_absmax, weight.offset)
