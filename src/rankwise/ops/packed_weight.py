"""A 4-bit weight: its codes, its scales, and their format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.constants import NESTED_BLOCK


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight W' of ``shape`` in NF4 or FP4:  W' = value[code] * absmax of its block (QLoRA, section 3).

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
    def parts(self) -> tuple[Tensor, Tensor, Sequence[int], str, int, Tensor | None, Tensor | None]:
        """The fields in the order of the operators' schemas; ``PackedWeight(*parts)`` is the way back."""
        return (
            self.codes, self.absmax, self.shape, self.quant_type, self.block_size, self.nested_absmax, self.offset
        )  # fmt: skip

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the names that 4-bit layers give them; without double quantization two of the four."""
        found = {"weight": self.codes, "absmax": self.absmax, "nested_absmax": self.nested_absmax}
        return {name: tensor for name, tensor in (*found.items(), ("offset", self.offset)) if tensor is not None}


# The names of the scales among `PackedWeight.tensors`.
SCALES = ("absmax", "nested_absmax", "offset")


def rows_are_blocks(shape: Sequence[int], block_size: int) -> bool:
    return len(shape) == 2 and shape[1] > 0 and shape[1] % block_size == 0


def packed_shape(shape: Sequence[int], block_size: int) -> tuple[int, int]:
    """Shape of the codes: (N, K / 2) where rows consist of whole blocks, so that rows can be sliced; else
    (ceil(n / 2), 1), as in bitsandbytes."""
    if rows_are_blocks(shape, block_size):
        return shape[0], shape[1] // 2
    return math.ceil(math.prod(shape) / 2), 1


def empty_scales(
    elements: int, block_size: int, double_quant: bool, device: torch.device | str | None
) -> dict[str, Tensor | None]:
    """Uninitialized scales of a weight, by name."""
    blocks = math.ceil(elements / block_size)
    nested = math.ceil(blocks / NESTED_BLOCK)
    return {
        "absmax": torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device),
        "nested_absmax": torch.empty(nested, dtype=torch.float32, device=device) if double_quant else None,
        "offset": torch.empty((), dtype=torch.float32, device=device) if double_quant else None,
    }
