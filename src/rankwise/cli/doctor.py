"""``rankwise doctor``: report the machine, the libraries, the kernels that run, and what to install."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

from rankwise.cli.options import Command
from rankwise.cli.output import Document, Output
from rankwise.options import Settings
from rankwise.reports.numbers import byte_size, plural

# Environment variables that change which kernels run.
SWITCHES = ("RANKWISE_OPS", "RANKWISE_CPU_LEVEL", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
# Extras for developing rankwise.
OURS = ("bench", "browser", "dev", "docs")


def run(settings: Settings, output: Output) -> Document:
    from rankwise.cli.plan_view import print_lines

    with output.waiting("looking at this machine"):
        parts = {"machine": [*_machine()], "libraries": [*_libraries()], "kernels": [*_kernels()]}
        findings = [*_findings()]
    for title, rows in {**parts, "what to do": findings or [("", "nothing: all works here.")]}.items():
        output.line(title.capitalize(), style="bold")
        print_lines(rows, output)
    found = [{"code": code, "message": message} for code, message in findings]
    return {**{title: dict(rows) for title, rows in parts.items()}, "findings": found}


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from rankwise.models import choose_device
    from rankwise.planning.hardware import cpu_hardware, cpu_name

    hardware = cpu_hardware()
    yield "system", f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
    yield "processor", f"{cpu_name()}, {plural(hardware.cores or 1, 'core')}"
    yield "free", f"{byte_size(hardware.memory_bytes)} of memory, {byte_size(shutil.disk_usage('.').free)} of disk"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"card {index}", f"{card.name}, {byte_size(card.total_memory)}, capability {card.major}.{card.minor}"
    yield "trains on", choose_device().reason
    if switches := [f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ]:
        yield "environment", ", ".join(switches)


def _libraries() -> Iterator[tuple[str, str]]:
    yield "rankwise", metadata.version("rankwise")
    yield "needed", ", ".join(f"{name} {version or '(missing)'}" for name, version, _ in _requirements())
    for extra in metadata.metadata("rankwise").get_all("Provides-Extra") or ():
        missing = ", ".join(name for name, _, wanted in _requirements(extra) if wanted)
        if extra not in OURS:
            yield extra, f'{missing} missing: pip install "rankwise[{extra}]"' if missing else "installed"


def _requirements(extra: str = "") -> Iterator[tuple[str, str | None, str]]:
    """(name, installed version, what to install where that does not fit) of rankwise itself, or of ``extra`` only."""
    from packaging.requirements import Requirement

    for one in map(Requirement, metadata.requires("rankwise") or ()):
        always, asked = (one.marker is None or one.marker.evaluate({"extra": name}) for name in ("", extra))
        if asked and not (extra and always):
            version = next((found.version for found in metadata.distributions(name=one.name)), None)
            fits = version is not None and one.specifier.contains(version, prereleases=True)
            yield one.name, version, "" if fits else f'"{one.name}{one.specifier}"'


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


def _findings() -> Iterator[tuple[str, str]]:
    import torch

    from rankwise.ops import selection
    from rankwise.ops.cpu import native

    if wanted := [wanted for _, _, wanted in _requirements() if wanted]:
        yield "RW790", f"rankwise needs other libraries than are installed; run pip install {' '.join(wanted)}."
    cards = torch.cuda.is_available()
    for obstacle in (native.obstacle(), selection.obstacle("triton", "cuda") if cards else None):
        if obstacle is not None:
            yield "RW608", f"4-bit products run in plain PyTorch, slowly: {obstacle}"
    if shutil.which("nvidia-smi") is not None and not cards:
        text = f"NVIDIA's driver is installed and torch {torch.__version__} uses no card; install torch's build for it"
        yield "RW791", f"{text}: https://pytorch.org/get-started/locally."


COMMAND = Command(
    name="doctor",
    settings=Settings,
    run=run,
    summary="Say what this machine has: devices, libraries, which kernels run and why, what to install.",
    examples=("rankwise doctor", "rankwise doctor --json"),
    exit_code=lambda document: 2 if any(found["code"] == "RW790" for found in document["findings"]) else 0,
)
