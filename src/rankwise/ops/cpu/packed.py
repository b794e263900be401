"""One 4-bit weight in the native library's form."""

from __future__ import annotations

import ctypes
from functools import cache

from rankwise.ops.codes import code_table, dynamic_map
from rankwise.ops.cpu.native import Weight
from rankwise.ops.packed_weight import PackedWeight


class NativeWeight:
    """The C view of one weight. It holds the tensors whose memory the C side reads."""

    def __init__(self, weight: PackedWeight) -> None:
        codes, absmax, nested_absmax = weight.codes.contiguous(), weight.absmax.contiguous(), weight.nested_absmax
        nested_absmax = None if nested_absmax is None else nested_absmax.contiguous()
        self.buffers = (codes, absmax, nested_absmax, weight.offset)
        self.struct = Weight(
            codes.data_ptr(),
            absmax.data_ptr(),
            None if nested_absmax is None else nested_absmax.data_ptr(),
            None if weight.offset is None else weight.offset.data_ptr(),
            ctypes.addressof(tables(weight.quant_type)[0]),
            None if nested_absmax is None else dynamic_map(codes.device).data_ptr(),
            weight.elements,
            weight.block_size,
        )

    def address(self) -> int:
        """The address of the C view. Each call updates its pointers, because FSDP moves weights between passes."""
        self.struct.packed, self.struct.absmax = self.buffers[0].data_ptr(), self.buffers[1].data_ptr()
        return ctypes.addressof(self.struct)


@cache
def tables(quant_type: str) -> tuple[ctypes.Array, ctypes.Array, ctypes.Array]:
    """16 values, 15 bounds between them in ascending order, and the 16 codes in that order."""
    table = code_table(quant_type)
    return (ctypes.c_float * 16)(*table.value), (ctypes.c_float * 15)(*table.bound), (ctypes.c_uint8 * 16)(*table.order)
