"""Where a run comes from: library versions, device."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

PACKAGES = ("rankwise", "torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of every library that could change a result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_record(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Type, name and dtype of the device that trains; threads on a CPU."""
    record: dict[str, Any] = {"type": device.type, "dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return record | {"name": name, "memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    return record | {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
