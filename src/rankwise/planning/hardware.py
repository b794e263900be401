"""The hardware of a plan: a named GPU, an amount of memory, or this machine. Imports torch only for a local GPU.

The table of GPUs, ``cards.csv``, has nominal memory, bandwidth and peak matrix throughput from vendors' data sheets.
Throughput is dense bfloat16 (float16 where the GPU has no bfloat16) with float32 accumulation, without sparsity. On
GeForce GPUs that is twice the float32 figure of the data sheet (the architecture white papers of GA102, AD102 and
GB202), on workstation GPUs of the same chips four times. GB is 10^9 bytes, GiB is 2^30; the two differ by 7 %.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rankwise.compat.system import cache_folder
from rankwise.errors import ConfigError
from rankwise.foreign import JsonObject
from rankwise.models.device import cpu_has_bfloat16, cpu_name, usable_cores
from rankwise.records import keep_json, kept_json
from rankwise.reports.numbers import byte_size

Kind = Literal["card", "memory", "machine"]
DeviceType = Literal["cpu", "cuda", "mps"]

# Names of this machine's processor, and of one with another memory.
THIS, LIKE_THIS = "this machine", "a machine like this one"
VENDOR_WORDS = (
    *("nvidia", "geforce", "tesla", "quadro", "amd", "radeon", "instinct", "apple", "generation", "gpu", "blackwell"),
    *("server", "workstation", "edition", "one", "die"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and its memory for training, in bytes, bytes per second and FLOP per second."""

    kind: Kind
    name: str
    device_type: DeviceType
    memory_bytes: int
    # None where unknown, which counts as True.
    has_bfloat16: bool | None = None
    bytes_per_second: float | None = None
    # Dense 16-bit peak.
    flops_per_second: float | None = None
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
    """The named GPU, or this machine; with ``memory`` in place of its own, if given.

    Raises ConfigError: RW140 for an invalid size, RW141 for an unknown GPU, with the closest names.
    """
    size = None if memory is None else parse_size(memory)
    if gpu is not None:
        found = of_card(find_card(gpu))
    else:
        found = this_machine()
    if size is None:
        return found
    if gpu is None:
        found = dataclasses.replace(found, kind="memory", name=found.name.replace(THIS, LIKE_THIS))
    return dataclasses.replace(found, memory_bytes=size, note="memory as given")


def shared(hardware: Hardware, processes: int) -> Hardware:
    """What one of ``processes`` on this machine has: an equal part of the processor's memory, or a GPU of its own."""
    if hardware.device_type != "cpu":
        return hardware
    return dataclasses.replace(hardware, memory_bytes=hardware.memory_bytes // processes, sharers=processes)


def find_card(name: str) -> Card:
    """The GPU of that name. Vendor words, case, spaces and hyphens are ignored. Raises ConfigError (RW141) for a name
    that no GPU has, or several.
    """
    card, *others = _fitting(name)
    if others:
        options = [f'--gpu "{found.name}"' for found in (card, *others)]
        raise ConfigError("RW141", f"{name} may mean several GPUs; give {', '.join(options[:-1])} or {options[-1]}.")
    return card


def _fitting(name: str) -> list[Card]:
    """Every GPU that the name may mean. Raises ConfigError (RW141) where there is none."""
    wanted = _CardName.read(name)
    found = [card for card in CARDS if wanted.may_mean(card)]
    if found:
        return found
    names = {_CardName.read(card.name).base: card.name for card in CARDS}
    # For a 4080 Ti the 4080, before the 4070 Ti.
    begun = (key for key in names if wanted.base.startswith(key))
    keys = dict.fromkeys([*begun, *difflib.get_close_matches(wanted.base, names, n=4, cutoff=0.5)])
    closest = ", ".join(names[key] for key in keys) or "RTX 4090, A100 80GB SXM, H100 SXM, Apple M4 Max 64GB"
    raise ConfigError(
        "RW141",
        f"there is no GPU {name!r} in the table; the closest are {closest}. With --memory 24GB one of "
        "these stands for a GPU of that memory.",
    )


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
        # A GPU by only its number: GeForce (4090) and workstation (A6000, 6000 Ada).
        base = f"rtx{base}" if re.match(r"[2345]0\d0(?!ada)|a\d[05]00$|\d[05]00ada$", base) else base
        return cls(base, float(size.group(1)) if size else None, form.group(1) if form else None)

    def may_mean(self, card: Card) -> bool:
        own = _CardName.read(card.name)
        same_form = self.form is None or own.form is None or self.form == own.form
        # As in "A100 80": the size without its unit.
        with_size = f"{own.base}{card.memory_gib:g}" if self.size is None else own.base
        return self.base in (own.base, with_size) and same_form and self.size in (None, card.memory_gib)


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


def this_machine(device: str = "auto") -> Hardware:
    """The CUDA GPU on which torch would train, Apple's GPU for ``device`` mps, else the CPU; with its free memory."""
    if device == "mps" or may_have_gpu():
        found = _torch_device(device)
        if found is not None:
            return found
    return cpu_hardware()


def may_have_gpu() -> bool:
    """Whether a driver suggests a GPU, so that importing torch is worth the seconds."""
    driver = any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/kfd", "/dev/dxg"))
    return driver or shutil.which("nvidia-smi") is not None


def _torch_device(device: str) -> Hardware | None:
    import torch

    if torch.cuda.is_available():
        return _cuda_device()
    if device == "mps" and torch.backends.mps.is_available():
        note = "memory shared with the system; what Metal recommends at most"
        size = torch.mps.recommended_max_memory()
        return Hardware(
            kind="machine",
            name="Apple GPU",
            device_type="mps",
            memory_bytes=size,
            has_bfloat16=True,
            source="torch.mps",
            note=note,
        )
    return None


def _cuda_device() -> Hardware:
    import torch

    name = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    # Memory of this process is available to it: the plan counts a context, and the allocator reuses its blocks.
    own = CONTEXT_BYTES + torch.cuda.memory_reserved()
    try:
        # Where two GPUs have one name, such as the RTX 3080, the memory decides.
        known = of_card(min(_fitting(name), key=lambda card: abs(card.usable_bytes - total)))
    except ConfigError:
        known = Hardware(kind="machine", name=name, device_type="cuda", memory_bytes=total, source="torch.cuda")
    return dataclasses.replace(
        known,
        kind="machine",
        name=name,
        memory_bytes=min(total, free + own),
        has_bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        note=f"free now, of {byte_size(total)}",
    )


def cpu_hardware() -> Hardware:
    """This machine's CPU, with the memory that is available now to this process and the cores that it may use."""
    import psutil

    memory, left = psutil.virtual_memory(), left_by_groups()
    limited = left < memory.available
    return Hardware(
        kind="machine",
        name=f"{THIS} ({cpu_name()})",
        device_type="cpu",
        # A peak counts what an idle process takes, and this process has that already.
        memory_bytes=min(left, memory.available) + own_bytes(),
        has_bfloat16=cpu_has_bfloat16(),
        bytes_per_second=None,
        flops_per_second=None,
        source="psutil",
        note=("left by the memory limit of this container or job" if limited else "available now")
        + f", of {byte_size(memory.total)}",
        cores=min(psutil.cpu_count(logical=False) or usable_cores(), usable_cores()),
    )


def own_bytes() -> int:
    """The memory that this process shares with no other."""
    import psutil

    own = psutil.Process().memory_info()
    return int(own.rss - getattr(own, "shared", 0))


# --- GPUs ---

MemoryKind = Literal["gddr", "gddr-ecc", "hbm", "unified"]

# Share of the nominal memory that is available to torch, before the context of a process.
#
# From the totals in public out-of-memory reports: RTX 4090 23.52 to 23.65 of 24 GiB, RTX 5090 31.36 of 32; A10 21.99 of
# 24 and L40 44.40 of 48 (ECC takes a sixteenth; a little less is counted); A100 39.39 of 40. Apple's Metal recommends
# three quarters at most.
VISIBLE_SHARE: dict[MemoryKind, float] = {"gddr": 0.98, "gddr-ecc": 0.91, "hbm": 0.985, "unified": 0.75}


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    has_bfloat16: bool
    # Approximate ratio of the float32 peak to the 16-bit peak: the smallest of the GPU's group. Apple's GPUs compute
    # float32 as fast as 16 bits.
    float32_share: float

    @property
    def usable_bytes(self) -> int:
        """The approximate total memory that torch reports."""
        return int(self.memory_gib * 2**30 * VISIBLE_SHARE[self.kind])


def _read_cards() -> Iterator[Card]:
    table = Path(__file__).with_name("cards.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(table.splitlines()):
        kind: Any = row["kind"]
        yield Card(
            name=row["name"],
            memory_gib=float(row["memory_gib"]),
            kind=kind,
            gigabytes_per_second=float(row["gigabytes_per_second"]),
            teraflops=float(row["teraflops"]) if row["teraflops"] else None,
            source=row["source"],
            has_bfloat16=row["has_bfloat16"] == "1",
            float32_share=float(row["float32_share"]),
        )


CARDS = tuple(_read_cards())


# --- sizes ---

# Bytes per unit; a letter alone (k, m, g, t) is decimal, and no unit at all means GB.
UNITS = {"b": 1} | {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?i?b|[kmgt])?", re.IGNORECASE)
# More than any machine has; a number of bytes without their unit is soon as large.
MOST_BYTES = 10**15


def parse_size(text: str | int | float) -> int:
    """Bytes in ``24``, ``24GB``, ``24 gb``, ``24g`` (each 24e9) or ``24GiB`` (24 * 2^30).

    Raises ConfigError (RW140) for what is not a size.
    """
    found = _SIZE.fullmatch(str(text).strip())
    unit = ((found[2] if found else None) or "gb").lower()
    size = float(found[1]) * UNITS.get(unit if unit.endswith("b") else f"{unit}b", 0) if found else 0
    if not 1 <= size < MOST_BYTES:
        raise ConfigError(
            "RW140",
            f"the memory {str(text)[:40]!r} is not a size of at most 1000 TB; write 24GB (10^9 bytes), 24GiB (2^30) or "
            "24 (GB).",
        )
    return round(size)


# --- what a CUDA device takes besides tensors ---

# The caching allocator hands out multiples of this (c10/cuda/CUDACachingAllocator: kMinBlockSize).
ROUNDING_BYTES = 512
# cuBLAS' workspace, from torch's allocator: 32 MiB on Hopper, 8.1 MiB before; the larger is taken.
WORKSPACE_BYTES = 32 << 20
# The CUDA context with torch's kernels, outside of the allocator: 300 to 550 MB by GPU and driver.
CONTEXT_BYTES = 500 << 20
# Segments that the allocator has reserved and cannot use, as a share of the peak in steady training.
FRAGMENTATION = 0.02


def in_blocks(size_bytes: int) -> int:
    """A block as the caching allocator counts it: ceil(size / 512) * 512."""
    return -(-size_bytes // ROUNDING_BYTES) * ROUNDING_BYTES


# --- what a CPU's process takes without a model ---

IDLE_PROCESS = (
    "import time, rankwise.planning.guard, rankwise.training.run, rankwise.cli.train; "
    "from rankwise.acceleration import anonymous_memory_bytes; print(anonymous_memory_bytes(), time.process_time())"
)


def idle_process_bytes() -> int:
    """The memory of a process of ``rankwise train`` here that has its libraries and nothing else, as a run's meter
    counts it. Measured once for each version."""
    return int(begin_idle_process().result())


@functools.cache
def begin_idle_process() -> Future[float]:
    """Measure it beside other work, since its imports take seconds."""
    return ThreadPoolExecutor(1).submit(measured_here, f"idle process, {_versions()}", lambda: _idle_process()[0])


def import_seconds() -> float:
    """The processor's time of such a process: that of its imports."""
    return measured_here(f"imports, {_versions()}", lambda: _idle_process()[1])


def _versions() -> str:
    return " ".join(f"{name} {version(name)}" for name in ("rankwise", "torch", "transformers"))


@functools.cache
def _idle_process() -> list[float]:
    done = subprocess.run([sys.executable, "-c", IDLE_PROCESS], capture_output=True, encoding="utf-8", check=True)
    return [float(figure) for figure in done.stdout.split()]


def measured_here(key: str, measure: Callable[[], float], *, again: bool = False) -> float:
    """A figure of this machine, kept for later plans; ``again``: measured even where one is kept."""
    file = cache_folder() / "machine.json"
    known = kept_json(file) or {}
    if again or key not in known:
        figure = measure()
        # Others may have kept theirs meanwhile.
        known = {**(kept_json(file) or {}), key: figure}
        keep_json(file, known)
    return float(known[key])


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
