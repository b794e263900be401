"""One 4-bit weight as the native library sees it."""

from __future__ import annotations

import ctypes
from functools import cache

from torch import Tensor

from rankwise.ops.codes import code_table, dynamic_map
from rankwise.ops.cpu.native import Weight


class NativeWeight:
    """The C view of one weight. It holds the tensors whose memory the C side reads."""

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        elements: int,
        quant_type: str,
        block_size: int,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
    ) -> None:
        packed, absmax = packed.contiguous(), absmax.contiguous()
        nested_absmax = None if nested_absmax is None else nested_absmax.contiguous()
        self.buffers = (packed, absmax, nested_absmax, offset)
        self.struct = Weight(
            packed.data_ptr(),
            absmax.data_ptr(),
            None if nested_absmax is None else nested_absmax.data_ptr(),
            None if offset is None else offset.data_ptr(),
            ctypes.addressof(tables(quant_type)[0]),
            None if nested_absmax is None else dynamic_map(packed.device).data_ptr(),
            elements,
            block_size,
        )


@cache
def tables(quant_type: str) -> tuple[ctypes.Array, ctypes.Array, ctypes.Array]:
    """16 values, 15 bounds between them in ascending order, and the 16 codes in that order."""
    table = code_table(quant_type)
    return (ctypes.c_float * 16)(*table.value), (ctypes.c_float * 15)(*table.bound), (ctypes.c_uint8 * 16)(*table.order)
