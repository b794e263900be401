"""The fused operators of a training step on a GPU, in Triton, with the signatures of `rankwise.ops.card_reference`.

The callers in ``rankwise.ops.table`` have checked types and shapes.
"""

from __future__ import annotations

from rankwise.ops.triton.dequantize import dequantize_gained_4bit
from rankwise.ops.triton.low_rank_grads import low_rank_grads_
from rankwise.ops.triton.row_cross import adapted_gain, adapted_gain_4bit

__all__ = ["adapted_gain", "adapted_gain_4bit", "dequantize_gained_4bit", "low_rank_grads_"]
