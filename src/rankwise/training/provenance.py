"""The origin of a run: library versions and device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from rankwise.acceleration import grow_segments
from rankwise.records import WAIT_POLICIES
from rankwise.training.arguments import implementation_of

PACKAGES = ("rankwise", "torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of every installed library that could change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_record(device: torch.device, dtype: torch.dtype, optimizer: str) -> dict[str, Any]:
    """Type, name and dtype of the training device.

    For a CPU also its threads and their waiting policy where one is set; for a card the settings of its allocator and
    the implementation of ``optimizer``.
    """
    record: dict[str, Any] = {"type": device.type, "dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        record |= {"allocator": grow_segments(), "optimizer": implementation_of(optimizer, device.type)}
        return record | {"name": name, "memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    waiting = {name: os.environ[name] for name in WAIT_POLICIES if name in os.environ}
    cpu = {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return record | cpu | {"wait_policy": waiting}
