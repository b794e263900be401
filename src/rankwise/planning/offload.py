"""Activation offloading in a trace: tensors saved for the backward pass are moved to the host's memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rankwise.acceleration import MovedOnce
from rankwise.compat.torch import current_node, storage_address
from rankwise.planning.tracker import StorageTracker

# trl's ``OffloadActivations``: smaller tensors stay on the device; after this many saves a copy counts as finished.
LEAST_BYTES, KEPT_SAVES = 1024, 5


class Offloading:
    """What trl's ``OffloadActivations`` holds on the card: parameters, the last few tensors while they are copied, and
    in the backward pass those of a node until the next one has its own."""

    def __init__(self, tracker: StorageTracker, model: nn.Module) -> None:
        self.tracker = tracker
        self.parameters = {storage_address(p.untyped_storage()) for p in model.parameters()}
        self.saves = itertools.count(1)
        # {number of a save: its tensor}
        self.waiting: dict[int, Tensor] = {}
        self.node: object = None
        self.back: list[Tensor] = []
        self.back_before: list[Tensor] = []

    def pack(self, tensor: Tensor) -> tuple[int, Tensor]:
        """(0, the tensor), or the number of the save and the copy in the host's memory."""
        number = next(self.saves)
        if tensor.nbytes < LEAST_BYTES or storage_address(tensor.untyped_storage()) in self.parameters:
            return 0, tensor
        self.waiting = {save: held for save, held in self.waiting.items() if save > number - KEPT_SAVES}
        whole = 0 in tensor.stride() or (tensor.is_contiguous() and not tensor.storage_offset())
        self.waiting[number] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        with self.tracker.elsewhere():
            return number, tensor.clone()

    def unpack(self, packed: tuple[int, Tensor]) -> Tensor:
        number, tensor = packed
        if not number:
            return tensor
        if number in self.waiting:
            return self.waiting[number]
        self.waiting.clear()
        if (node := current_node()) is not self.node:
            self.node, self.back, self.back_before = node, [], self.back
        self.back.append(tensor.clone())
        return self.back[-1]


@contextmanager
def offloaded(tracker: StorageTracker, model: nn.Module) -> Iterator[None]:
    """Within this, a step's saved tensors are offloaded as the trainer does it."""
    held = Offloading(tracker, model)
    once = MovedOnce(held.pack, held.unpack)
    with saved_tensors_hooks(once.pack, once.unpack):
        yield
