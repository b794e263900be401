"""Memory for large results.

`on_huge_pages`: page faults of 4 KiB each make new memory slower to map than to fill.

`roomy`: for results that are freed before tensors that were made after them. For an aligned block of n bytes glibc
needs a free block of n + 96 bytes, so a freed tensor is too small for the next one of its size. In a forward pass every
layer would leave a hole: a twentieth of a LoRA step's memory, a twelfth of a DoRA step's. Padding avoids the holes.
There are three sizes of padding, so that a request fits a freed block with more padding: PyTorch's own tensors have
none, outputs of products 4 KiB, short-lived tensors 8 KiB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.compat.torch import in_backward_pass
from rankwise.ops.cpu.native import library

OF_OUTPUTS, OF_SHORT_LIVED = 4 << 10, 8 << 10
# Minimum bytes. What remains of a reused block is then too large for glibc's small bins, whose blocks are not merged.
_LEAST_BYTES = 256 << 10
_LEAST_BYTES_ON_HUGE_PAGES = 4 << 20


def on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor, on huge pages where it is large enough and the system provides them."""
    made = torch.empty(tuple(shape), dtype=dtype)
    if made.nbytes >= _LEAST_BYTES_ON_HUGE_PAGES:
        library().rw_use_huge_pages(made.data_ptr(), made.nbytes)
    return made


def roomy(shape: Sequence[int], dtype: torch.dtype, spare_bytes: int) -> Tensor:
    """An uninitialized tensor, dense, whose storage is larger by ``spare_bytes`` where it is large enough to matter.

    The tensor is not a view, so autograd allows writing to it in place. Inside a backward pass, where checkpointing
    recomputes a layer, there is no padding: saved tensors are freed soon, and small objects in the padding would keep
    glibc from merging the freed blocks (20 to 47 MB more with DoRA).
    """
    shape, count = tuple(shape), math.prod(shape)
    if count * dtype.itemsize < _LEAST_BYTES or in_backward_pass():
        return torch.empty(shape, dtype=dtype)
    return torch.empty(count + spare_bytes // dtype.itemsize, dtype=dtype).resize_(shape)
