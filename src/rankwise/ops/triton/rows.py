"""Helpers of the kernels of a training step: rows of a matrix in memory, and operands of ``tl.dot``.

Legend: T = rows (all leading dimensions together), N = columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.triton.tile import INTERPRETED


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
