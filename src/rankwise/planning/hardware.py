"""The hardware of a plan: a named GPU, an amount of memory, or this machine. Imports torch only for a local GPU."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import platform
import re
import shutil
from pathlib import Path
from typing import Literal

from rankwise.errors import ConfigError
from rankwise.foreign import JsonObject
from rankwise.models.device import cpu_has_bfloat16, cpu_info, usable_cores
from rankwise.planning import control_groups
from rankwise.planning.cards import CARDS, Card
from rankwise.planning.cuda import context_bytes
from rankwise.planning.sizes import parse_size
from rankwise.reports.numbers import byte_size

Kind = Literal["card", "memory", "machine"]
DeviceType = Literal["cpu", "cuda", "mps"]

VENDOR_WORDS = (
    *("nvidia", "geforce", "tesla", "quadro", "amd", "radeon", "instinct", "apple", "generation", "gpu", "blackwell"),
    *("server", "workstation", "edition", "one", "die"),
)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its memory for training, in bytes, bytes per second and FLOP per second."""

    kind: Kind
    name: str
    device_type: DeviceType
    memory_bytes: int
    # None where unknown, which counts as True.
    has_bfloat16: bool | None
    bytes_per_second: float | None
    # Dense 16-bit peak.
    flops_per_second: float | None
    source: str
    # A remark on the memory.
    note: str | None = None
    cores: int | None = None
    float32_flops_per_second: float | None = None
    # The card that was assumed for an ambiguous name, and the names of the others.
    assumption: str | None = None
    # Number of processes of a run that share this processor; ``memory_bytes`` is the part of one.
    sharers: int = 1

    @property
    def dtype(self) -> Literal["bfloat16", "float16", "float32"]:
        """The dtype that ``--dtype auto`` gives on the device."""
        if self.has_bfloat16 is not False:
            return "bfloat16"
        return "float16" if self.device_type == "cuda" else "float32"

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


def choose_hardware(gpu: str | None, memory: str | None) -> Hardware:
    """The named card (with ``memory`` in place of its own, if given), a device with ``memory``, or this machine.

    Raises ConfigError: RW140 for an invalid size, RW141 for an unknown card, with the closest names.
    """
    size = None if memory is None else parse_size(memory)
    if gpu is not None:
        found = of_card(*find_card(gpu))
        return found if size is None else dataclasses.replace(found, memory_bytes=size, note="memory as given")
    if size is None:
        return this_machine()
    return Hardware("memory", "a card", "cuda", size, None, None, None, "as given")


def shared(hardware: Hardware, processes: int) -> Hardware:
    """What one of ``processes`` on this machine has: an equal part of the processor's memory, or a GPU of its own."""
    if hardware.kind != "machine" or hardware.device_type != "cpu":
        return hardware
    return dataclasses.replace(hardware, memory_bytes=hardware.memory_bytes // processes, sharers=processes)


def find_card(name: str) -> tuple[Card, str | None]:
    """(card, assumption). Of several cards that the name may mean, the one with the least memory and speed is assumed.

    Vendor words, case, spaces and hyphens are ignored. Raises ConfigError (RW141).
    """
    fitting = _fitting(name)
    card = min(fitting, key=lambda card: (card.memory_gib, card.teraflops or 0))
    others = [other.name for other in fitting if other is not card]
    if others:
        return card, f"{name} is taken for {card.name}; for another give {_as_options(others)}."
    laptop = f"{card.name} Laptop"
    if _CardName.read(name).size is None and any(other.name == laptop for other in CARDS):
        return card, f"{card.name} is taken for the desktop card; for the laptop's give {_as_options([laptop])}."
    return card, None


def _fitting(name: str) -> list[Card]:
    """Every card that the name may mean. Raises ConfigError (RW141) where there is none."""
    wanted = _CardName.read(name)
    found = [card for card in CARDS if wanted.may_mean(card)]
    if not found:
        raise _unknown_card(name, wanted.base)
    return found


def _as_options(names: list[str]) -> str:
    """``--gpu "A", --gpu "B" or --gpu "C"``."""
    *most, last = [f'--gpu "{name}"' for name in names]
    return f"{', '.join(most)} or {last}" if most else last


@dataclasses.dataclass(frozen=True)
class _CardName:
    """``NVIDIA A100-SXM4-80GB`` -> a100, 80, sxm."""

    base: str
    size: float | None
    form: str | None

    @classmethod
    def read(cls, name: str) -> _CardName:
        text = re.sub(r"[^a-z0-9]+", " ", name.lower().replace("hbm3", "sxm").replace("mobile", "laptop"))
        size = re.search(r"(?<![a-z0-9])(\d+) ?gi?b?\b", text)
        form = re.search(r"\b(pcie|sxm|nvl)\d?\b", text)
        for found in (size, form):
            text = text.replace(found.group(), " ", 1) if found else text
        base = re.sub(rf"\b({'|'.join(VENDOR_WORDS)})\b", "", text).replace(" ", "")
        # A card by its number alone: GeForce (4090) and workstation (A6000, 6000 Ada).
        base = f"rtx{base}" if re.match(r"[2345]0\d0(?!ada)|a\d[05]00$|\d[05]00ada$", base) else base
        return cls(base, float(size.group(1)) if size else None, form.group(1) if form else None)

    def may_mean(self, card: Card) -> bool:
        own = _CardName.read(card.name)
        same_form = self.form is None or own.form is None or self.form == own.form
        # As in "A100 80": the size without its unit.
        with_size = f"{own.base}{card.memory_gib:g}" if self.size is None else own.base
        return self.base in (own.base, with_size) and same_form and self.size in (None, card.memory_gib)


def _unknown_card(name: str, base: str) -> ConfigError:
    names = {_CardName.read(card.name).base: card.name for card in CARDS}
    # The same card without the suffix is closer than another with it: for a 4080 Ti the 4080, not the 4070 Ti.
    longer = [key for key in names if base and base in key]
    keys = [key for key in names if base.startswith(key) and len(key) > 3]
    keys += [key for key in [*difflib.get_close_matches(base, names, n=4, cutoff=0.5), *longer] if key not in keys]
    closest = (
        ", ".join(names[key] for key in dict.fromkeys(keys[:4]))
        or "RTX 4090, A100 80GB SXM, H100 SXM, Apple M4 Max 64GB"
    )
    return ConfigError(
        "RW141",
        f"there is no card {name!r} in the table; the closest are {closest}. --memory 24GB plans for any other.",
    )


def of_card(card: Card, assumption: str | None = None) -> Hardware:
    device: DeviceType = "mps" if card.name.startswith("Apple") else "cuda"
    return Hardware(
        kind="card",
        name=card.name,
        device_type=device,
        memory_bytes=card.usable_bytes,
        has_bfloat16=card.has_bfloat16,
        bytes_per_second=card.gigabytes_per_second * 1e9,
        flops_per_second=None if card.teraflops is None else card.teraflops * 1e12,
        source=card.source,
        float32_flops_per_second=None if card.teraflops is None else card.float32_share * card.teraflops * 1e12,
        assumption=assumption,
    )


def this_machine() -> Hardware:
    """The GPU on which torch would train, else the CPU, with the memory that is free now."""
    if _may_have_gpu():
        found = _torch_device()
        if found is not None:
            return found
    return cpu_hardware()


def _may_have_gpu() -> bool:
    """Whether torch's build and a driver suggest a GPU, so that importing torch is worth the seconds."""
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    driver = any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/kfd", "/dev/dxg"))
    return _torch_is_built_for_gpus() and (driver or shutil.which("nvidia-smi") is not None)


def _torch_is_built_for_gpus() -> bool:
    """Whether the installed torch supports GPUs, from the text of its version file, without importing it."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        text = Path(folder, "version.py").read_text(encoding="utf-8")
        return re.search(r"^(cuda|hip)\b.*=\s*['\"]", text, re.MULTILINE) is not None
    return False


def _torch_device() -> Hardware | None:
    import torch

    if torch.cuda.is_available():
        return _cuda_device()
    if torch.backends.mps.is_available():
        note = "memory shared with the system; what Metal recommends at most"
        size = torch.mps.recommended_max_memory()
        return Hardware("machine", "Apple GPU", "mps", size, True, None, None, "torch.mps", note)
    return None


def _cuda_device() -> Hardware:
    import torch

    name = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    # Memory of this process is available to it: the plan counts a context, and the allocator reuses its blocks.
    own = context_bytes() + torch.cuda.memory_reserved()
    try:
        # Where two cards have one name, such as the RTX 3080, the memory decides.
        known = of_card(min(_fitting(name), key=lambda card: abs(card.usable_bytes - total)))
    except ConfigError:
        known = None
    return Hardware(
        kind="machine",
        name=name,
        device_type="cuda",
        memory_bytes=min(total, free + own),
        has_bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        bytes_per_second=known.bytes_per_second if known else None,
        flops_per_second=known.flops_per_second if known else None,
        source=known.source if known else "torch.cuda",
        note=f"free now, of {byte_size(total)}",
        float32_flops_per_second=known.float32_flops_per_second if known else None,
    )


def cpu_hardware() -> Hardware:
    """This machine's CPU, with the memory that is available now to this process and the cores that it may use."""
    import psutil

    memory, left = psutil.virtual_memory(), control_groups.free_bytes()
    limited = left < memory.available
    return Hardware(
        kind="machine",
        name=f"this machine ({cpu_name()})",
        device_type="cpu",
        memory_bytes=left if limited else memory.available,
        has_bfloat16=cpu_has_bfloat16(),
        bytes_per_second=None,
        flops_per_second=None,
        source="psutil",
        note=("left by the memory limit of this container or job" if limited else "available now")
        + f", of {byte_size(memory.total)}",
        cores=min(psutil.cpu_count(logical=False) or usable_cores(), usable_cores()),
    )


def cpu_name() -> str:
    """The processor's name in words."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpu_info(), re.MULTILINE)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return re.sub(r"\s*(\(R\)|\(TM\)|\d+-Core Processor|Processor|CPU\b.*)", "", name).strip()
