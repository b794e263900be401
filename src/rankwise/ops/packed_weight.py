"""A 4-bit weight: its codes, its scales, their format, and the tables of values behind the codes; or a weight as a GGUF
file holds it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

from rankwise.compat.torch import plain_tensors
from rankwise.constants import MXFP4, NESTED_BLOCK
from rankwise.ops.gguf_blocks import BLOCK_TYPES


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight W' of ``shape`` in NF4, FP4 or Q4_0:  W' = value[code] * absmax of its block (QLoRA, section 3).

    Or one in the `BLOCK_TYPES` of files: ``codes`` are its rows (N, bytes of a row), which hold their own scales, and
    ``absmax`` is empty, or the uint8 exponents of MXFP4.

    Legend: n = elements of W', blocks = ceil(n / block_size). Blocks run along the row-major flattening.
    """

    # uint8, two codes a byte, the first one in the high nibble; `packed_shape` gives the shape.
    codes: Tensor
    # float32 (blocks,); double-quantized uint8 (blocks,), with the two second-level tensors below.
    absmax: Tensor
    shape: Sequence[int]
    quant_type: str = "nf4"
    block_size: int = 64
    # float32 (ceil(blocks / 256),), or None without double quantization.
    nested_absmax: Tensor | None = None
    # float32 (), or None without double quantization.
    offset: Tensor | None = None
    # int32 (N,), of a GGUF file: the row of ``codes`` where row n lies, or its first byte in codes of one dimension;
    # None: at n.
    order: Tensor | None = None
    # The dtype of the weight before it was quantized: the default result of dequantizing.
    dtype: torch.dtype = torch.float32

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows_are_blocks(self) -> bool:
        """Whether the rows of a matrix W' (N, K) consist of whole blocks, so that a kernel can walk along a row."""
        return rows_are_blocks(self.shape, self.block_size)

    @property
    def in_file_blocks(self) -> bool:
        return self.quant_type in BLOCK_TYPES

    def rows(self, rows: slice) -> PackedWeight:
        """Rows of a matrix W' whose rows are whole blocks, and whose scales are float32."""
        shape = (rows.stop - rows.start, self.shape[1])
        if self.order is not None:
            return dataclasses.replace(self, shape=shape, order=self.order[rows])
        absmax = self.absmax.view(self.shape[0], self.absmax.numel() // self.shape[0])[rows].reshape(-1)
        return dataclasses.replace(self, codes=self.codes.view(self.shape[0], -1)[rows], absmax=absmax, shape=shape)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Sequence[int], str, int, Tensor | None, Tensor | None, Tensor | None]:
        """The fields but the dtype, in the order of the operators' schemas."""
        return (
            self.codes, self.absmax, self.shape, self.quant_type, self.block_size, self.nested_absmax, self.offset,
            self.order,
        )  # fmt: skip

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the names that 4-bit layers give them; without double quantization two of the four."""
        found = {"weight": self.codes, "absmax": self.absmax, "nested_absmax": self.nested_absmax}
        return {name: tensor for name, tensor in (*found.items(), ("offset", self.offset)) if tensor is not None}


# The names of the scales among `PackedWeight.tensors`.
SCALES = ("absmax", "nested_absmax", "offset")


def format_of(source: Any) -> dict[str, Any]:
    """The format of a `PackedWeight`, a 4-bit layer or a config, as arguments of what makes another in this format."""
    return {name: getattr(source, name) for name in ("quant_type", "block_size", "double_quant")}


def rows_are_blocks(shape: Sequence[int], block_size: int) -> bool:
    return len(shape) == 2 and shape[1] > 0 and shape[1] % block_size == 0


def packed_shape(shape: Sequence[int], block_size: int) -> tuple[int, int]:
    """Shape of the codes: (N, K / 2) where rows consist of whole blocks, so that rows can be sliced; else
    (ceil(n / 2), 1), as in bitsandbytes."""
    if rows_are_blocks(shape, block_size):
        return shape[0], shape[1] // 2
    return math.ceil(math.prod(shape) / 2), 1


def empty_scales(
    quant_type: str, elements: int, block_size: int, double_quant: bool, device: torch.device | str | None
) -> dict[str, Tensor | None]:
    """Uninitialized scales of a weight, by name."""
    blocks = math.ceil(elements / block_size)
    nested = math.ceil(blocks / NESTED_BLOCK)
    kind = torch.uint8 if double_quant or quant_type == MXFP4 else torch.float32
    return {
        "absmax": torch.empty(blocks, dtype=kind, device=device),
        "nested_absmax": torch.empty(nested, dtype=torch.float32, device=device) if double_quant else None,
        "offset": torch.empty((), dtype=torch.float32, device=device) if double_quant else None,
    }


# The code tables of the 4-bit types and of double quantization, which the native library and the Triton kernels receive
# as arguments:
#
#     w ≈ absmax * value[code]                       one absmax per block, one 4-bit code per element
#     code = order[number of bounds below w/absmax]   bounds: midpoints of the sorted values

Parameters = ParamSpec("Parameters")


# Equal bins of [-1, 1] in which bitsandbytes' CPU code looks up the nearest 8-bit code.
DYNAMIC_BINS = 65536

# Quantiles of N(0, 1) scaled to [-1, 1] with an exact zero (QLoRA, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Sign, two exponent bits, one mantissa bit, in bit-pattern order; scaled by 1/12 below. Both zeros are +0.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)


@dataclass(frozen=True)
class CodeTable:
    """One 4-bit type: what a code means and where one code ends and the next begins."""

    # (16,) float32 values; ``value[code]`` times absmax is the weight.
    value: tuple[float, ...]
    # (15,) midpoints of the sorted values, ascending. A value on a bound belongs to the lower side.
    bound: tuple[float, ...]
    # (16,) codes in ascending order of their values.
    order: tuple[int, ...]


@cache
def code_table(quant_type: str) -> CodeTable:
    """The table of one of ``PACKED_TYPES``; KeyError for any other name (the public functions check first)."""
    # Also where the first to ask is a trace on tensors without values, whose numbers are all 1.
    with plain_tensors():
        values = {"nf4": torch.tensor(_NF4, dtype=torch.float32), "fp4": torch.tensor(_FP4, dtype=torch.float32) / 12}
        # llama.cpp's (code - 8) d, with the scale -8 d: the element of the largest magnitude, and its sign.
        values["q4_0"] = 1 - torch.arange(16, dtype=torch.float32) / 8
        value = values[quant_type]
        order = torch.argsort(value, stable=True)
        bound = (value[order][:-1] + value[order][1:]) / 2
        return CodeTable(tuple(value.tolist()), tuple(bound.tolist()), tuple(order.tolist()))


# The types of bitsandbytes, in which a base can be loaded.
QUANT_TYPES = ("nf4", "fp4")
# The types of a `PackedWeight`.
PACKED_TYPES = (*QUANT_TYPES, "q4_0")


def _kept(make: Callable[Parameters, Tensor]) -> Callable[Parameters, Tensor]:
    """Cache a table for the process. It is a plain tensor, even if the first caller is in a functional transform, a
    fake mode or inference mode.
    """

    @cache
    @wraps(make)
    def kept(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Tensor:
        with plain_tensors():
            return make(*args, **kwargs)

    return cast(Callable[Parameters, Tensor], kept)


@_kept
def code_values(quant_type: str, device: torch.device) -> Tensor:
    """(16,) float32 on ``device``."""
    return torch.tensor(code_table(quant_type).value, dtype=torch.float32, device=device)


@_kept
def code_bounds(quant_type: str, device: torch.device) -> Tensor:
    """(15,) float32 on ``device``."""
    return torch.tensor(code_table(quant_type).bound, dtype=torch.float32, device=device)


@_kept
def code_order(quant_type: str, device: torch.device) -> Tensor:
    """(16,) uint8 on ``device``."""
    return torch.tensor(code_table(quant_type).order, dtype=torch.uint8, device=device)


@_kept
def dynamic_map(device: torch.device) -> Tensor:
    """(256,) float32: the signed 8-bit dynamic data type, ascending ("8-bit approximations", Dettmers 2016).

    Decade ``i`` of seven, 10^(i-6), holds ``2^i`` midpoints of equal steps from 0.1 to 1, with both signs; 0 and 1
    complete it.
    """
    values = [0.0, 1.0]
    for i in range(7):
        steps = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        midpoints = (steps[:-1] + steps[1:]) / 2
        decade = 10 ** (i - 6)
        values += (decade * midpoints).tolist() + (-decade * midpoints).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@_kept
def dynamic_bins(device: torch.device) -> Tensor:
    """(65536,) uint8: the code of each of the equal bins, ``-1 + 2 i / 65535``, ties to the lower code."""
    codes = dynamic_map(torch.device("cpu"))
    middle = 0.5 * (codes[:-1] + codes[1:])
    centre = -1.0 + (2.0 * torch.arange(DYNAMIC_BINS, dtype=torch.float32)) / (DYNAMIC_BINS - 1)
    return torch.bucketize(centre, middle).to(torch.uint8).to(device)
