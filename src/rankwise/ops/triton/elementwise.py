"""What a training step fuses on Triton beside 4-bit products, with the signatures of `rankwise.ops.reference`.

float32, bfloat16 and float16. The callers in ``rankwise.ops.table`` have checked types and shapes.
"""

from __future__ import annotations

from rankwise.ops.triton.cross_entropy import cross_entropy_
from rankwise.ops.triton.dropout import dropout, dropout_add_
from rankwise.ops.triton.four_bit import dequantize_gained_4bit
from rankwise.ops.triton.glu import glu, glu_backward
from rankwise.ops.triton.low_rank import low_rank_add_
from rankwise.ops.triton.low_rank_grads import low_rank_grads_
from rankwise.ops.triton.rms_norm import rms_norm, rms_norm_backward
from rankwise.ops.triton.rope import rope, rope_
from rankwise.ops.triton.row_cross import adapted_gain, adapted_gain_4bit, row_cross
from rankwise.ops.triton.scaled_grad import scaled_grad

__all__ = [
    "adapted_gain",
    "adapted_gain_4bit",
    "cross_entropy_",
    "dequantize_gained_4bit",
    "dropout",
    "dropout_add_",
    "glu",
    "glu_backward",
    "low_rank_add_",
    "low_rank_grads_",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_",
    "row_cross",
    "scaled_grad",
]
