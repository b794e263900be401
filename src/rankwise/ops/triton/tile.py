"""Functions that kernels share: reading codes and scales, rounding, rows in memory, and launching.

Legend: a *span* is a run of ``SPAN`` elements with one scale that a kernel processes at once, a block or an equal part
of one; HALF = SPAN / 2 is its bytes. Element 2j of a span is the high nibble of byte j, element 2j + 1 the low one.

Weight offsets are 64-bit: a weight may have more than 2^31 elements. Multiplication and addition are rounded one by one
(``enable_fp_fusion=False``), as in the reference, and fused only where a kernel says ``tl.fma``: that keeps weights
equal to the bit.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankwise import constants
from rankwise.errors import QuantizationError
from rankwise.ops.packed_weight import PackedWeight, code_values, dynamic_map

# Read when the kernels are decorated, which fixes whether they are interpreted or compiled.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
NESTED_BLOCK = tl.constexpr(constants.NESTED_BLOCK)

DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def block_scales(
    block: tl.tensor,
    inside: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    dynamic_map: tl.tensor,
) -> tl.tensor:
    """absmax[block], or dynamic_map[absmax[block]] * nested_absmax[block // 256] + offset; 0 where not ``inside``."""
    stored = tl.load(absmax + block, mask=inside, other=0)
    if nested_absmax is None:
        scale = stored
    else:
        nested = tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside, other=0.0)
        scale = tl.load(dynamic_map + stored.to(tl.int32)) * nested + tl.load(offset)
        scale = tl.where(inside, scale, 0.0)
    return scale


@triton.jit
def decode(pairs: tl.tensor, scale: tl.tensor, values: tl.tensor) -> tl.tensor:
    """value[code] * scale for both nibbles of each byte, float32; the 16 values stay in the L1 cache."""
    code = pairs.to(tl.int32)
    return tl.load(values + (code >> 4)) * scale, tl.load(values + (code & 15)) * scale


@triton.jit
def round_to(w: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 -> dtype, to nearest even. The interpreter's own conversion to bfloat16 truncates."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = w.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            rounded = w.to(dtype)
    else:
        rounded = w.to(dtype)
    return rounded


@triton.jit
def row_tile(
    rows: tl.tensor,
    spans: tl.tensor,
    N: tl.tensor,
    row_spans: tl.tensor,
    row_bytes: tl.tensor,
    packed: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    dynamic_map: tl.tensor,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """rows (R,), spans (S,) -> bytes (R, S, HALF) and scales (R, S, 1); scales are 0 outside the weight.

    Rows consist of whole blocks, so that ``rows * row_spans + spans`` counts the spans of the weight.
    """
    rows = rows.to(tl.int64)
    inside = (rows < N)[:, None] & (spans < row_spans)[None, :]
    column = (spans * (SPAN // 2))[None, :, None] + tl.arange(0, SPAN // 2)[None, None, :]
    pairs = tl.load(packed + rows[:, None, None] * row_bytes + column, mask=inside[:, :, None], other=0)
    span = rows[:, None] * row_spans + spans[None, :]
    scale = block_scales(span // (BLOCK // SPAN), inside, absmax, nested_absmax, offset, dynamic_map)
    return pairs, scale[:, :, None]


def buffers(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    """The first six arguments of every kernel: codes, absmax, nested_absmax, offset, values, dynamic_map; contiguous,
    the two tables on the device of the weight."""
    codes, absmax, nested_absmax = weight.codes.contiguous(), weight.absmax.contiguous(), weight.nested_absmax
    values = code_values(weight.quant_type, codes.device)
    if nested_absmax is None:
        return codes, absmax, None, None, values, None
    return codes, absmax, nested_absmax.contiguous(), weight.offset, values, dynamic_map(codes.device)


def power_of_two(count: int) -> int:
    """The least power of two that is not below ``count`` > 0."""
    return 1 << (count - 1).bit_length()


def is_old(device: torch.device) -> bool:
    """Whether the GPU's compute capability is below 8.0, such as a T4's 7.5: a block has 64 KB of shared memory, and
    Triton's products do not use tensor cores.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def launching_on(device: torch.device) -> AbstractContextManager[None]:
    """A context in which kernels run on ``device``: Triton launches on the current one, wherever its arguments are.

    Raises:
        QuantizationError: RW607 for a CPU tensor with kernels that were compiled for a GPU.
    """
    if device.type == "cuda":
        return torch.cuda.device(device)
    if INTERPRETED.value:
        return nullcontext()
    raise QuantizationError(
        "RW607",
        f"the Triton kernels run on CUDA tensors and got tensors on {device}: move the model to a CUDA device, "
        "choose a different implementation, or, for tests, set TRITON_INTERPRET=1 before Python starts.",
    )


@triton.jit
def dot_operand(part: tl.tensor) -> tl.tensor:
    """``part`` as ``tl.dot`` takes it. The interpreter multiplies bfloat16 as integers."""
    if INTERPRETED:
        part = part.to(tl.float32)
    return part


def as_rows(x: Tensor) -> Tensor:
    """x as (T, N) with columns side by side: a view where its strides allow one, else a copy. x is not empty."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def write_back(rows: Tensor, x: Tensor) -> Tensor:
    """x with the values of ``rows = as_rows(x)``, which are copied back where rows is not a view of x."""
    return x if rows.data_ptr() == x.data_ptr() else x.copy_(rows.view(x.shape))
