"""The hardware of a plan: a named card, an amount of memory, or this machine. Imports torch only for a local GPU.

The table of cards holds nominal memory, bandwidth and peak matrix throughput from their vendors' data sheets.
Throughput is dense bfloat16 (float16 where the card has no bfloat16) with float32 accumulation, without sparsity. On
GeForce cards that is twice the float32 figure of the data sheet (the architecture white papers of GA102, AD102 and
GB202), on workstation cards of the same chips four times. GB is 10^9 bytes, GiB is 2^30; the two differ by 7 %.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import platform
import re
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from rankwise.errors import ConfigError
from rankwise.foreign import JsonObject
from rankwise.models.device import cpu_has_bfloat16, cpu_info, usable_cores
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
        found = of_card(find_card(gpu))
        return found if size is None else dataclasses.replace(found, memory_bytes=size, note="memory as given")
    if size is None:
        return this_machine()
    return Hardware("memory", "a card", "cuda", size, None, None, None, "as given")


def shared(hardware: Hardware, processes: int) -> Hardware:
    """What one of ``processes`` on this machine has: an equal part of the processor's memory, or a GPU of its own."""
    if hardware.kind != "machine" or hardware.device_type != "cpu":
        return hardware
    return dataclasses.replace(hardware, memory_bytes=hardware.memory_bytes // processes, sharers=processes)


def find_card(name: str) -> Card:
    """The card of that name. Vendor words, case, spaces and hyphens are ignored. Raises ConfigError (RW141) for a name
    that no card has, or several.
    """
    card, *others = _fitting(name)
    if others:
        names = [card.name, *(other.name for other in others)]
        raise ConfigError("RW141", f"{name} may mean several cards; give {_as_options(names)}.")
    return card


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


def of_card(card: Card) -> Hardware:
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

    memory, left = psutil.virtual_memory(), left_by_groups()
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


# --- cards ---

MemoryKind = Literal["gddr", "gddr-ecc", "hbm", "unified"]

# Share of the nominal memory that is available to torch, before the context of a process.
#
# From the totals in public out-of-memory reports: RTX 4090 23.52 to 23.65 of 24 GiB, RTX 5090 31.36 of 32; A10 21.99 of
# 24 and L40 44.40 of 48 (ECC takes a sixteenth; a little less is counted); A100 39.39 of 40. Apple's Metal recommends
# three quarters at most.
VISIBLE_SHARE: dict[MemoryKind, float] = {"gddr": 0.98, "gddr-ecc": 0.91, "hbm": 0.985, "unified": 0.75}


@dataclasses.dataclass(frozen=True)
class Card:
    """One accelerator, as it is sold."""

    name: str
    # Nominal.
    memory_gib: float
    kind: MemoryKind
    gigabytes_per_second: float
    # None where the vendor publishes no figure.
    teraflops: float | None
    source: str
    has_bfloat16: bool = True
    # Approximate ratio of the float32 peak to the 16-bit peak: the smallest of the card's group.
    float32_share: float = 1 / 2

    @property
    def usable_bytes(self) -> int:
        """The approximate total memory that torch reports."""
        return int(self.memory_gib * 2**30 * VISIBLE_SHARE[self.kind])


_AMPERE = "NVIDIA, GA102 and GA104 white papers, GeForce RTX 30 specifications"
_ADA = "NVIDIA, Ada (AD102) white paper, GeForce RTX 40 specifications"
_BLACKWELL = "NVIDIA, RTX Blackwell white paper, GeForce RTX 50 specifications"
_TURING = "NVIDIA, Turing white paper"
_WORKSTATION = "NVIDIA, data sheet of the RTX workstation card"
_DATACENTER = "NVIDIA, data sheet of the data-center card"
_AMD = "AMD, data sheet of the accelerator"
_APPLE = "Apple, technical specifications"


def _cards(
    kind: MemoryKind, source: str, *rows: tuple[str, float, float, float], bf16: bool = True, float32: float = 1 / 2
) -> tuple[Card, ...]:
    return tuple(
        Card(name, memory, kind, bandwidth, peak, source, bf16, float32) for name, memory, bandwidth, peak in rows
    )


def _apple(chip: str, sizes: tuple[int, ...], bandwidth: float, teraflops: float | None) -> tuple[Card, ...]:
    # Apple's GPUs compute float32 as fast as 16 bits.
    return tuple(Card(f"{chip} {size}GB", size, "unified", bandwidth, teraflops, _APPLE, True, 1.0) for size in sizes)


CARDS: tuple[Card, ...] = (
    # (name, GiB, GB/s, TFLOP/s)
    *_cards(
        "gddr",
        _TURING,
        ("RTX 2080 Ti", 11, 616, 53.8),
        ("TITAN RTX", 24, 672, 130.5),
        bf16=False,
        float32=1 / 8,
    ),
    *_cards(
        "gddr",
        _AMPERE,
        ("RTX 3050", 8, 224, 18.2),
        ("RTX 3060", 12, 360, 25.5),
        ("RTX 3060 Ti", 8, 448, 32.4),
        ("RTX 3070", 8, 448, 40.6),
        ("RTX 3070 Ti", 8, 608, 43.5),
        ("RTX 3080 10GB", 10, 760, 59.5),
        ("RTX 3080 12GB", 12, 912, 61.3),
        ("RTX 3080 Ti", 12, 912, 68.2),
        ("RTX 3090", 24, 936, 71.2),
        ("RTX 3090 Ti", 24, 1008, 80.0),
    ),
    *_cards(
        "gddr",
        _ADA,
        ("RTX 4060", 8, 272, 30.2),
        ("RTX 4060 Ti 8GB", 8, 288, 44.1),
        ("RTX 4060 Ti 16GB", 16, 288, 44.1),
        ("RTX 4070", 12, 504, 58.3),
        ("RTX 4070 Super", 12, 504, 71.0),
        ("RTX 4070 Ti", 12, 504, 80.2),
        ("RTX 4070 Ti Super", 16, 672, 88.2),
        ("RTX 4080", 16, 717, 97.5),
        ("RTX 4080 Super", 16, 736, 104.4),
        ("RTX 4090", 24, 1008, 165.2),
        ("RTX 4060 Laptop", 8, 256, 23.2),
        ("RTX 4070 Laptop", 8, 256, 31.2),
        ("RTX 4080 Laptop", 12, 432, 49.4),
        ("RTX 4090 Laptop", 16, 576, 66.0),
    ),
    *_cards(
        "gddr",
        _BLACKWELL,
        ("RTX 5060", 8, 448, 38.4),
        ("RTX 5060 Ti 8GB", 8, 448, 47.4),
        ("RTX 5060 Ti 16GB", 16, 448, 47.4),
        ("RTX 5070", 12, 672, 61.7),
        ("RTX 5070 Ti", 16, 896, 87.9),
        ("RTX 5080", 16, 960, 112.6),
        ("RTX 5090", 32, 1792, 209.5),
        ("RTX 5090 Laptop", 24, 896, 63.5),
    ),
    *_cards(
        "gddr",
        _WORKSTATION,
        ("RTX A2000 12GB", 12, 288, 31.9),
        ("RTX A4000", 16, 448, 76.7),
        ("RTX A4500", 20, 640, 94.6),
        ("RTX A5000", 24, 768, 111.1),
        ("RTX A6000", 48, 768, 154.8),
        ("RTX 2000 Ada", 16, 224, 48.0),
        ("RTX 4000 Ada", 20, 360, 106.9),
        ("RTX 4500 Ada", 24, 432, 158.5),
        ("RTX 5000 Ada", 32, 576, 261.1),
        ("RTX 6000 Ada", 48, 960, 364.2),
        ("RTX PRO 6000 Blackwell", 96, 1792, 503.8),
        float32=1 / 4,
    ),
    *_cards("hbm", _DATACENTER, ("P100", 16, 732, 18.7), bf16=False),
    *_cards("gddr-ecc", _DATACENTER, ("T4", 16, 320, 65.0), bf16=False, float32=1 / 8),
    *_cards(
        "hbm",
        _DATACENTER,
        ("V100 16GB", 16, 900, 112.0),
        ("V100 32GB", 32, 900, 112.0),
        bf16=False,
        float32=1 / 8,
    ),
    *_cards(
        "gddr-ecc",
        _DATACENTER,
        ("A10", 24, 600, 125.0),
        ("A10G", 24, 600, 70.0),
        ("A40", 48, 696, 149.7),
        ("L4", 24, 300, 121.0),
        ("L40", 48, 864, 181.0),
        ("L40S", 48, 864, 362.0),
        float32=1 / 4,
    ),
    *_cards(
        "hbm",
        _DATACENTER,
        ("A30", 24, 933, 165.0),
        ("A100 40GB", 40, 1555, 312.0),
        ("A100 80GB PCIe", 80, 1935, 312.0),
        ("A100 80GB SXM", 80, 2039, 312.0),
        ("H100 PCIe", 80, 2000, 756.0),
        ("H100 SXM", 80, 3350, 989.0),
        ("H100 NVL", 94, 3900, 835.0),
        ("GH200", 96, 4000, 989.0),
        ("H20", 96, 4000, 148.0),
        ("H200", 141, 4800, 989.0),
        float32=1 / 16,
    ),
    *_cards("hbm", _DATACENTER, ("B200", 180, 8000, 2250.0), float32=1 / 30),
    *_cards("unified", "NVIDIA, DGX Spark data sheet", ("DGX Spark", 128, 273, 125.0), float32=1 / 4),
    *_cards(
        "hbm",
        _AMD,
        ("MI210", 64, 1638, 181.0),
        ("MI250X one die", 64, 1638, 191.5),
        ("MI300X", 192, 5300, 1307.0),
        ("MI325X", 256, 6000, 1307.0),
        float32=1 / 8,
    ),
    *_cards("gddr", "AMD, Radeon specifications", ("RX 7900 XTX", 24, 960, 122.8)),
    *_apple("Apple M1", (8, 16), 68, 2.6),
    *_apple("Apple M1 Pro", (16, 32), 200, 5.2),
    *_apple("Apple M1 Max", (32, 64), 400, 10.4),
    *_apple("Apple M1 Ultra", (64, 128), 800, 20.8),
    *_apple("Apple M2", (8, 16, 24), 100, 3.6),
    *_apple("Apple M2 Pro", (16, 32), 200, 6.8),
    *_apple("Apple M2 Max", (32, 64, 96), 400, 13.6),
    *_apple("Apple M2 Ultra", (64, 128, 192), 800, 27.2),
    *_apple("Apple M3", (8, 16, 24), 100, None),
    *_apple("Apple M3 Pro", (18, 36), 150, None),
    # The variant with fewer cores and a narrower bus.
    *_apple("Apple M3 Max", (36, 96), 300, None),
    *_apple("Apple M3 Max", (48, 64, 128), 400, None),
    *_apple("Apple M3 Ultra", (96, 256, 512), 819, None),
    *_apple("Apple M4", (16, 24, 32), 120, None),
    *_apple("Apple M4 Pro", (24, 48, 64), 273, None),
    *_apple("Apple M4 Max", (36,), 410, None),
    *_apple("Apple M4 Max", (48, 64, 128), 546, None),
)


# --- sizes ---

# Bytes per unit; a letter alone (k, m, g, t) is decimal, and no unit at all means GB.
UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}

# A larger number without a unit cannot mean GB.
MOST_BARE = 100_000
MOST_BYTES = 2**63
# Largest number of characters of a value in a message.
LONGEST_TEXT = 40

_SIZE = re.compile(r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)\s*([kmgt]?i?b?)", re.IGNORECASE)
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))")


def parse_size(text: str | int | float) -> int:
    """Bytes in ``24``, ``24GB``, ``24 gb``, ``24g`` (each 24e9) or ``24GiB`` (24 * 2^30).

    A comma before three digits separates thousands (``1,024MB``), any other comma is a decimal point (``1,5TB``).

    Raises ConfigError (RW140) for an empty text and for text that is not a size.
    """
    found = _SIZE.fullmatch(str(text).strip())
    unit = (found.group(2).lower() or "gb") if found else ""
    if found is None or unit == "i":
        raise _no_size(text)
    unit = unit if unit.endswith("b") else f"{unit}b"
    number = float(_THOUSANDS.sub("", found.group(1)).replace(",", "."))
    if not found.group(2) and MOST_BARE < number < MOST_BYTES:
        raise ConfigError(
            "RW140",
            f"the memory {_shortened(text)} has no unit and would mean GB; did you mean bytes? Write "
            f"{size_option(number)}.",
        )
    size = number * UNITS.get(unit, 0)
    if size >= MOST_BYTES:
        raise ConfigError(
            "RW140", f"the memory {_shortened(text)} is more than any machine has; write 24GB, 24GiB or 24 (GB)."
        )
    if round(size) < 1:
        raise _no_size(text)
    return round(size)


def _shortened(text: object) -> str:
    """The value as given, shortened to LONGEST_TEXT characters."""
    given = str(text)
    return repr(given if len(given) <= LONGEST_TEXT else f"{given[:LONGEST_TEXT]}...")


def _no_size(text: object) -> ConfigError:
    return ConfigError(
        "RW140",
        f"the memory {_shortened(text)} is not a size above 0; write 24GB (10^9 bytes), 24GiB (2^30) or 24 (GB).",
    )


def size_option(size_bytes: float) -> str:
    """``24GB``, ``1.5MB`` or ``900kB``, as an option takes it."""
    unit = next((name for name in ("GB", "MB", "kB") if size_bytes >= UNITS[name.lower()]), "B")
    return f"{size_bytes / UNITS[unit.lower()]:.12g}{unit}"


# --- what a CUDA device takes besides tensors ---

MIB = 1 << 20
# The caching allocator hands out multiples of this (c10/cuda/CUDACachingAllocator: kMinBlockSize).
ROUNDING_BYTES = 512


def in_blocks(size_bytes: int) -> int:
    """A block as the caching allocator counts it: ceil(size / 512) * 512."""
    return -(-size_bytes // ROUNDING_BYTES) * ROUNDING_BYTES


def workspace_bytes() -> int:
    """cuBLAS' workspace, from torch's allocator: 32 MiB on Hopper, 8.1 MiB before; the larger is taken."""
    return 32 * MIB


def context_bytes() -> int:
    """The CUDA context with torch's kernels, outside of the allocator: 300 to 550 MB by card and driver."""
    return 500 * MIB


def fragmentation_bytes(peak_bytes: int) -> int:
    """Segments that the allocator has reserved and cannot use: about 2 % of the peak in steady training."""
    return peak_bytes // 50


# --- limits of containers, SLURM jobs and systemd units ---

ROOT = Path("/")
UNLIMITED = 2**63


class _Version(NamedTuple):
    mount: str
    limit: str
    usage: str
    # Cached pages of files that the kernel frees first, in memory.stat.
    freed_first: str


V1 = _Version(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", freed_first="total_inactive_file"
)
V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", freed_first="inactive_file")


def left_by_groups() -> int:
    """The bytes that the tightest group of this process leaves; ``UNLIMITED`` without a limit.

    The groups above a group limit it too. In a container, the path of the group may not exist below the mounted
    folder; the folder itself is the group then.
    """
    try:
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return UNLIMITED
    left = [UNLIMITED]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = V1 if controllers else V2
        mount = ROOT / version.mount
        group = mount / path.lstrip("/")
        left += [_left(place, version) for place in (group, *group.parents) if place.is_relative_to(mount)]
    return min(left)


def _left(group: Path, version: _Version) -> int:
    try:
        # Without a limit, version 2 writes "max".
        limit, usage = (int((group / name).read_text(encoding="ascii")) for name in (version.limit, version.usage))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return UNLIMITED
    return max(0, limit - usage + int(counts.get(version.freed_first, 0)))
