"""Cache a value that is computed from parameters, and detect when it is out of date.

A tensor's version counter counts PyTorch's in-place operations, and a replaced tensor has another storage. Two kinds of
writers bypass both. Optimizers with their own kernels (fused AdamW, bitsandbytes) are caught by the hook on every
optimizer's step. Code that writes through ``parameter.data`` is caught on a CPU by comparing with a copy of the
parameters (of rank size); on an accelerator the comparison would force a synchronisation, so such a write is noticed at
the next optimizer step only. A write to a frozen base through ``.data`` is not noticed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from rankwise.compat.torch import StorageWeakRef, is_fake, writes_to
from rankwise.ops.selection import is_traced, transforms_functions

Key = tuple[object, ...]

_steps_taken = 0


class Kept:
    """One value, kept while the ``trained`` tensors and the key of the frozen ones stay unchanged."""

    def __init__(self) -> None:
        self._key: Key | None = None
        self._copies: list[Tensor] = []
        self._value: Tensor | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        # A copied module has other parameters, here or in another process, so its cache starts empty.
        return Kept, ()

    def get(self, trained: tuple[Tensor, ...], frozen: Key) -> Tensor | None:
        """The value, or None where it is out of date or was never set."""
        if self._value is None or not _trackable(trained) or self._key != _key(trained, frozen):
            return None
        same = all(torch.equal(copy, tensor) for copy, tensor in zip(self._copies, filter(_comparable, trained)))
        return self._value if same else None

    def keep(self, trained: tuple[Tensor, ...], frozen: Key, value: Tensor) -> Tensor:
        if _trackable((*trained, value)):
            self._key, self._value = _key(trained, frozen), value
            self._copies = [tensor.detach().clone() for tensor in trained if _comparable(tensor)]
        return value

    def tensors(self) -> list[Tensor]:
        """All tensors that this holds: the copies for comparison and the value."""
        return self._copies if self._value is None else [*self._copies, self._value]


def trained_key(tensor: Tensor) -> Key | None:
    """A key that changes with every write to a trained tensor, or None where writes cannot be detected."""
    return _key((tensor,), ()) if _trackable((tensor,)) else None


def frozen_key(tensor: Tensor) -> Key:
    """(id of the tensor, weak reference to its storage, version counter)."""
    if transforms_functions():
        # Tensors wrapped by torch.func have no storage, and nothing is cached for them.
        return id(tensor), 0, 0
    # The weak reference lets the memory be freed, and keeps the address from being reused by a later storage.
    return id(tensor), StorageWeakRef(tensor.untyped_storage()), writes_to(tensor)


def _key(trained: tuple[Tensor, ...], frozen: Key) -> Key:
    _count_optimizer_steps()
    return (*frozen, _steps_taken if trained else 0, *(frozen_key(tensor) for tensor in trained))


def _trackable(tensors: tuple[Tensor, ...]) -> bool:
    # Tensors made under inference_mode have no version; compiled graphs and torch.func compute the value themselves.
    return not is_traced() and not any(tensor.is_inference() for tensor in tensors)


def _comparable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not is_fake(tensor)


@functools.cache
def _count_optimizer_steps() -> None:
    register_optimizer_step_post_hook(_count)


def _count(*_: object) -> None:
    global _steps_taken
    _steps_taken += 1
