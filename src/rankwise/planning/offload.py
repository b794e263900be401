"""Activation offloading in a trace: tensors saved for the backward pass are moved to the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rankwise.planning.tracker import StorageTracker

# trl leaves smaller tensors where they are.
LEAST_ELEMENTS_BYTES = 1024


@contextmanager
def offloaded(tracker: StorageTracker) -> Iterator[None]:
    """Copy saved tensors of 1 KiB and more to the host, and back when the backward pass asks for them.

    As with trl's ``OffloadActivations``, parameters and other tensors that are not activations stay.
    """

    def pack(tensor: Tensor) -> Tensor | tuple[Tensor]:
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < LEAST_ELEMENTS_BYTES:
            return tensor
        with tracker.elsewhere():
            return (tensor.clone(),)

    def unpack(packed: Tensor | tuple[Tensor]) -> Tensor:
        return packed[0].clone() if isinstance(packed, tuple) else packed

    with saved_tensors_hooks(pack, unpack):
        yield
