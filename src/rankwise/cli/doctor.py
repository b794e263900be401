"""``rankwise doctor``: report the machine, the libraries, the kernels that run, and what to install."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output
from rankwise.options import Settings
from rankwise.reports.numbers import byte_size, plural

# Environment variables that change which kernels run.
SWITCHES = ("RANKWISE_OPS", "RANKWISE_CPU_LEVEL", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
# Extras for developing rankwise.
OURS = ("bench", "browser", "dev", "docs")


class DoctorSettings(Settings):
    """The options of ``rankwise doctor``: those common to all verbs."""


def run(settings: DoctorSettings, output: Output) -> Document:
    from rankwise.cli.plan_view import print_lines

    with output.waiting("looking at this machine"):
        parts = {"machine": dict(_machine()), "libraries": dict(_libraries()), "kernels": dict(_kernels())}
        findings = [*_of_libraries(), *_of_kernels()]
    for title, rows in parts.items():
        output.line(title.capitalize(), style="bold")
        print_lines(list(rows.items()), output)
        output.line()
    output.line("What to do", style="bold")
    print_lines(findings or [("", "nothing: all that rankwise has works here.")], output)
    return {
        **parts,
        "findings": [{"code": code, "message": message} for code, message in findings],
        "works": not any(code == "RW790" for code, _ in findings),
    }


def _machine() -> Iterator[tuple[str, str]]:
    import psutil
    import torch

    from rankwise.models import choose_device
    from rankwise.planning.hardware import cpu_hardware, cpu_name

    hardware = cpu_hardware()
    python = platform.python_version()
    yield "system", f"{platform.system()} {platform.release()} on {platform.machine()}, Python {python}"
    yield "processor", f"{cpu_name()}, {plural(hardware.cores or 1, 'core')}"
    total = psutil.virtual_memory().total
    yield "memory", f"{byte_size(hardware.memory_bytes)} available now, of {byte_size(total)}"
    yield "disk", f"{byte_size(shutil.disk_usage(os.curdir).free)} free in this folder"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"card {index}", f"{card.name}, {byte_size(card.total_memory)}, capability {card.major}.{card.minor}"
    yield "trains on", choose_device().reason
    if switches := [f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ]:
        yield "environment", ", ".join(switches)


def _libraries() -> Iterator[tuple[str, str]]:
    from rankwise.models.source import DEMO_INSTALL, DEMO_PACKAGE

    yield "rankwise", metadata.version("rankwise")
    yield "needed", ", ".join(f"{name} {version or '(missing)'}" for name, _, version, _ in _requirements())
    for extra in metadata.metadata("rankwise").get_all("Provides-Extra") or ():
        if extra not in OURS:
            missing = [name for name, _, _, fits in _requirements(extra) if not fits]
            install = f'{", ".join(missing)} missing: pip install "rankwise[{extra}]"'
            yield extra, install if missing else "installed"
    found = importlib.util.find_spec(DEMO_PACKAGE)
    yield "demo", "installed" if found else f"the model of --model demo is missing: {DEMO_INSTALL}"


def _requirements(extra: str = "") -> Iterator[tuple[str, str, str | None, bool]]:
    """(name, range, installed version, whether it fits) of what rankwise needs, or of what ``extra`` adds."""
    from packaging.requirements import Requirement

    for one in map(Requirement, metadata.requires("rankwise") or ()):
        always = one.marker is None or one.marker.evaluate({"extra": ""})
        if always != bool(extra) and (always or (one.marker and one.marker.evaluate({"extra": extra}))):
            try:
                version = metadata.version(one.name)
            except metadata.PackageNotFoundError:
                version = None
            fits = version is not None and one.specifier.contains(version, prereleases=True)
            yield one.name, str(one.specifier), version, fits


def _of_libraries() -> Iterator[tuple[str, str]]:
    wrong = [f'"{name}{needs}"' for name, needs, _, fits in _requirements() if not fits]
    if wrong:
        yield "RW790", f"rankwise needs other libraries than are installed; run pip install {' '.join(wrong)}."


def _kernels() -> Iterator[tuple[str, str]]:
    import torch

    from rankwise.ops import selection
    from rankwise.ops.cpu import attention, native, products

    if torch.cuda.is_available() and selection.obstacle("triton", "cuda") is None:
        yield "cuda", f"Triton {metadata.version('triton')}"
    if selection.forced() not in ("auto", "native") or native.obstacle() is not None:
        yield "cpu", "plain PyTorch"
        return
    level, best = native.level(), native.LEVELS[native.library().rw_best_level()]
    yield "cpu", level if level == best else f"{level} by RANKWISE_CPU_LEVEL; this processor can run {best}"
    slower = f"float32, {level}: no bfloat16 products at this level"
    yield "products", (level if products.on_tiles() else slower) if products.available() else "PyTorch's own: no AVX2"
    missing = attention.missing(torch.bfloat16 if products.on_tiles() else torch.float32)
    yield "attention", level if missing is None else f"PyTorch's own: {missing}"


def _of_kernels() -> Iterator[tuple[str, str]]:
    import torch

    from rankwise.ops import selection
    from rankwise.ops.cpu import native

    cards = torch.cuda.is_available()
    for obstacle in (native.obstacle(), selection.obstacle("triton", "cuda") if cards else None):
        if obstacle is not None:
            yield "RW608", f"4-bit products run in plain PyTorch, slowly: {obstacle}"
    if shutil.which("nvidia-smi") is not None and not cards:
        build = "is built without CUDA" if torch.version.cuda is None else "finds no card that it can use"
        yield (
            "RW791",
            f"NVIDIA's driver is installed and torch {torch.__version__} {build}, so no card is used; install the "
            "build for your CUDA version: https://pytorch.org/get-started/locally.",
        )


VERB = Verb(
    name="doctor",
    settings=DoctorSettings,
    run=run,
    summary="Say what this machine has: devices, libraries, which kernels run and why, what to install.",
    examples=("rankwise doctor", "rankwise doctor --json"),
    exit_code=lambda document: 0 if document["works"] else 2,
)
