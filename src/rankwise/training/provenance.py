"""The origin of a run: its libraries and its device."""

from __future__ import annotations

import os
import platform

import torch

from rankwise.acceleration import grow_segments
from rankwise.foreign import JsonObject
from rankwise.records import WAIT_POLICIES
from rankwise.training.optimizers import implementation_of

# Libraries whose version can change a result.
PACKAGES = ("rankwise", "torch", "transformers", "datasets", "safetensors", "tokenizers")


def device_record(device: torch.device, dtype: torch.dtype, optimizer: str) -> JsonObject:
    """Type, name and dtype of the training device.

    For a CPU also the number of threads and their wait policy where one is set; for a GPU the allocator's settings and
    the implementation of ``optimizer``.
    """
    record: JsonObject = {"type": device.type, "dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        record |= {"allocator": grow_segments(), "optimizer": implementation_of(optimizer, device.type)}
        return record | {"name": name, "memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    waiting = {name: os.environ[name] for name in WAIT_POLICIES if name in os.environ}
    cpu = {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return record | cpu | {"wait_policy": waiting}
