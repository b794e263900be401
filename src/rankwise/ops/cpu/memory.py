"""Memory for large results.

Fresh memory costs more, in page faults of 4 KiB each, than filling it: `on_huge_pages`.

Some results are let go while what was made after them stays: `roomy`. For an aligned block of n bytes glibc wants a
free one of n + 96, so that what a tensor leaves is too small for the next of its size: in a forward pass every layer
would leave a hole, a twentieth of a LoRA step's memory and a twelfth of a DoRA step's. With a little room to spare it
is used again. Three ranks of room, since a block must find one above its own: what PyTorch makes has none, a product's
output some, and what lives shortest most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.compat.torch import in_backward_pass
from rankwise.ops.cpu.native import library

OF_OUTPUTS, OF_SHORT_LIVED = 4 << 10, 8 << 10
# Bytes. What is split off a used block is larger than what glibc sets aside for itself and does not join again.
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

    No view: it may be written to in place wherever autograd sees it. Fake where tensors are. Inside a backward pass,
    where checkpointing runs a layer again, there is nothing to spare: what is kept goes at once, and small objects in
    what was split off would hold its blocks apart (20 to 47 MB more with DoRA).
    """
    shape, count = tuple(shape), math.prod(shape)
    if count * dtype.itemsize < _LEAST_BYTES or in_backward_pass():
        return torch.empty(shape, dtype=dtype)
    return torch.empty(count + spare_bytes // dtype.itemsize, dtype=dtype).resize_(shape)
