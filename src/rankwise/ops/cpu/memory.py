"""Memory for large results.

Fresh memory costs more, in page faults of 4 KiB each, than filling it: `on_huge_pages`.

Some results are freed while tensors that were made after them stay: `roomy`. For an aligned block of n bytes glibc
needs a free block of n + 96 bytes, so a freed tensor is too small for the next one of its size. In a forward pass every
layer would leave a hole: a twentieth of a LoRA step's memory, a twelfth of a DoRA step's. Padding closes the holes.
There are three classes of it, since a request must fit a freed block of a higher class: PyTorch's own tensors have
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
# Bytes. The rest of a used block is then larger than the small sizes that glibc sets aside and does not join again.
_LEAST_BYTES = 256 << 10
_LEAST_BYTES_ON_HUGE_PAGES = 4 << 20


def on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor, on huge pages where it is large enough and the system gives them."""
    made = torch.empty(tuple(shape), dtype=dtype)
    if made.nbytes >= _LEAST_BYTES_ON_HUGE_PAGES:
        library().rw_use_huge_pages(made.data_ptr(), made.nbytes)
    return made


def roomy(shape: Sequence[int], dtype: torch.dtype, spare_bytes: int) -> Tensor:
    """An uninitialized tensor, dense, whose storage is larger by ``spare_bytes`` where it is large enough to matter.

    The tensor is not a view, so autograd allows writing to it in place. Inside a backward pass, where
    checkpointing runs a layer again, there is no padding. Kept tensors are freed at once there, and small objects in
    the padding would keep the freed blocks apart (20 to 47 MB more with DoRA).
    """
    shape, count = tuple(shape), math.prod(shape)
    if count * dtype.itemsize < _LEAST_BYTES or in_backward_pass():
        return torch.empty(shape, dtype=dtype)
    return torch.empty(count + spare_bytes // dtype.itemsize, dtype=dtype).resize_(shape)
