"""Operators with shape and dtype contracts. `reference` is the specification; `implementation` says what runs."""

from rankwise.ops.four_bit import (
    dequantize_4bit,
    dequantize_absmax,
    dequantize_weight,
    linear_4bit,
    linear_4bit_input_grad,
    quantize_4bit,
    quantize_absmax,
    quantize_weight,
    row_cross_4bit,
    row_norms_4bit,
)
from rankwise.ops.packed_weight import PackedWeight, packed_shape
from rankwise.ops.selection import implementation, set_implementation

__all__ = [
    "PackedWeight",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_weight",
    "implementation",
    "linear_4bit",
    "linear_4bit_input_grad",
    "packed_shape",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_weight",
    "row_cross_4bit",
    "row_norms_4bit",
    "set_implementation",
]
