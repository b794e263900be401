"""Activation offloading in a trace: what is saved for the backward pass waits in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rankwise.planning.tracker import StorageTracker

LEAST_ELEMENTS_BYTES = 1024
# trl leaves smaller tensors where they are.


@contextmanager
def offloaded(tracker: StorageTracker) -> Iterator[None]:
    """Saved tensors of 1 KiB and more are copied to the host, and back when the backward pass asks for them.

    As trl's ``OffloadActivations``: parameters and what is no activation stay.
    """

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < LEAST_ELEMENTS_BYTES:
            return tensor
        with tracker.elsewhere():
            return (tensor.clone(),)

    def unpack(packed: Any) -> Tensor:
        return packed[0].clone() if isinstance(packed, tuple) else packed

    with saved_tensors_hooks(pack, unpack):
        yield
