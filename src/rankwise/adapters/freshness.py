"""When a value that was computed from parameters has to be computed anew.

A tensor's version counter sees the in-place operations of PyTorch, and its storage every replacement. Some writers go
past both: optimizers with kernels of their own (fused AdamW, bitsandbytes), which the hook on every optimizer's step
catches, and code that writes through ``parameter.data``, which a hash of the values catches on a CPU, where it costs
microseconds. On an accelerator the hash would force a synchronisation; there such a write counts from the next optimizer
step on.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Key = tuple[int, ...]

_steps_taken = 0


def frozen_key(tensor: Tensor) -> Key:
    """Identity of a frozen tensor's storage and of what was written to it."""
    return tensor.untyped_storage()._cdata, tensor._version


def trained_key(tensor: Tensor) -> Key:
    """The same for a parameter that trains, with the writers that leave no trace in the tensor."""
    _count_optimizer_steps()
    readable = tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
    values = int(torch.hash_tensor(tensor.detach()).item()) if readable else 0
    return *frozen_key(tensor), _steps_taken, values


@functools.cache
def _count_optimizer_steps() -> None:
    register_optimizer_step_post_hook(_count)


def _count(*_: Any) -> None:
    global _steps_taken
    _steps_taken += 1
