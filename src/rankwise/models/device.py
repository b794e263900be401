"""The device and dtype of a run, with the reason in one line."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.errors import ModelError

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"}


@dataclasses.dataclass(frozen=True)
class DeviceChoice:
    """A device (torch's name), the base model's dtype on it, and the reason for both."""

    device: str
    dtype: torch.dtype
    reason: str


def choose_device(device: str | None = "auto", dtype: str | torch.dtype | None = "auto") -> DeviceChoice:
    """The device to run on and the base's dtype there.

    ``device``: auto (CUDA, else CPU; MPS was never tried), cpu, cuda, cuda:N or mps. ``dtype``: auto, bfloat16,
    float16, float32 or a torch dtype. Automatic dtypes: bfloat16 where the hardware computes in it, else float16 on
    CUDA and float32 elsewhere. Under torchrun, CUDA is the GPU of LOCAL_RANK. Raises ModelError (RW312) for a device
    or dtype that is not available.
    """
    chosen, why_device = _device(device or "auto")
    chosen_dtype, why_dtype = _dtype(dtype or "auto", chosen)
    return DeviceChoice(chosen, chosen_dtype, f"{why_device}; {why_dtype}")


def _device(name: str) -> tuple[str, str]:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return _cuda("cuda")
        if torch.backends.mps.is_available():
            return "cpu", "cpu: the Apple GPU was never tried (--device mps takes it)"
        return "cpu", "cpu: no GPU that torch can use"
    if name == "cpu":
        return "cpu", "cpu: as asked"
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ModelError("RW312", "the device mps was requested, and torch finds no Apple GPU; use cpu or auto.")
        return "mps", "mps: as asked"
    if name == "cuda" or (name.startswith("cuda:") and name[5:].isdigit()):
        return _cuda(name)
    raise ModelError("RW312", f"there is no device {name!r}; give auto, cpu, cuda, cuda:N or mps.")


def _cuda(name: str) -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        build = "is built without CUDA" if torch.version.cuda is None else "finds no usable CUDA GPU"
        raise ModelError(
            "RW312", f"the device {name} was requested, and torch {torch.__version__} {build}; use cpu or auto."
        )
    index = int(name[5:] or 0) if ":" in name else int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if index >= count:
        raise ModelError("RW312", f"the device cuda:{index} was asked for, and this machine has {count} CUDA GPU(s).")
    return f"cuda:{index}", f"cuda:{index}: {torch.cuda.get_device_name(index)}"


def _dtype(dtype: str | torch.dtype, device: str) -> tuple[torch.dtype, str]:
    import torch

    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return _automatic_dtype(device)
    if dtype not in DTYPES:
        raise ModelError("RW312", f"training in {dtype!r} is not possible; give auto, {', '.join(DTYPES)}.")
    if dtype == "bfloat16" and device.startswith("cuda") and not _cuda_has_bfloat16():
        raise ModelError("RW312", f"{device} does not compute in bfloat16; use float16 (with loss scaling) or float32.")
    return getattr(torch, dtype), f"{dtype}: as asked"


def _automatic_dtype(device: str) -> tuple[torch.dtype, str]:
    import torch

    if device.startswith("cuda"):
        if _cuda_has_bfloat16():
            return torch.bfloat16, "bfloat16: the GPU computes in it"
        return torch.float16, "float16 with loss scaling: the GPU has no bfloat16"
    if device == "mps":
        if torch.backends.mps.is_macos_or_newer(14, 0):
            return torch.bfloat16, "bfloat16: macOS 14 or newer has it"
        return torch.float32, "float32: bfloat16 needs macOS 14"
    if cpu_has_bfloat16():
        return torch.bfloat16, "bfloat16: the processor computes in it"
    return torch.float32, "float32: the processor has no bfloat16 instructions"


def _cuda_has_bfloat16() -> bool:
    import torch

    # Without emulation, which torch offers on a T4 and which is many times slower.
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions, according to the kernel or, if it does not tell, torch."""
    flags = cpu_flags()
    if flags:
        return bool(BF16_FLAGS & flags)
    import torch

    # Not every torch build has both probes.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def cpu_flags() -> set[str]:
    """The processor's instruction sets by the kernel's names; empty where the kernel does not list them."""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpu_info(), re.MULTILINE)
    return set() if flags is None else set(flags.group(1).split())


def usable_cores() -> int:
    """The number of logical CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name in words."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpu_info(), re.MULTILINE)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return re.sub(r"\s*(\(R\)|\(TM\)|\d+-Core Processor|Processor|CPU\b.*)", "", name).strip()


def cpu_info() -> str:
    """The text of /proc/cpuinfo; empty on systems other than Linux."""
    return CPU_INFO.read_text(encoding="utf-8", errors="replace") if CPU_INFO.exists() else ""
