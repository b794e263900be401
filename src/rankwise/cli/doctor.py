"""``rankwise doctor``: report the machine, the libraries, the kernels that run, and what to install."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

from rankwise.cli.options import Command
from rankwise.options import Settings
from rankwise.reports.numbers import byte_size, plural
from rankwise.verbs.output import Document, Output


def run(settings: Settings, output: Output) -> Document:
    from rankwise.verbs.plan_view import print_lines

    with output.waiting("looking at this machine"):
        parts = {"machine": dict(_machine()), "libraries": dict(_libraries()), "kernels": dict(_kernels())}
        findings = [*_findings()]
    for title, rows in {**parts, "what to do": dict(findings) or {"": "nothing: all works here."}}.items():
        output.line(title.capitalize(), style="bold")
        print_lines(rows.items(), output)
    return {**parts, "findings": [{"code": code, "message": message} for code, message in findings]}


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from rankwise.compat.system import cache_folder
    from rankwise.models import choose_device
    from rankwise.models.device import cpu_name
    from rankwise.planning.hardware import cpu_hardware

    hardware = cpu_hardware()
    yield "system", f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
    yield "processor", f"{cpu_name()}, {plural(hardware.cores or 1, 'core')}"
    yield "free", f"{byte_size(hardware.memory_bytes)} of memory, {byte_size(shutil.disk_usage('.').free)} of disk"
    bases = cache_folder() / "bases"
    if held := [path.stat().st_size for path in bases.glob("base-*/*")]:
        yield "kept bases", f"{byte_size(sum(held))} in {bases}; each may be deleted, and is prepared again when needed"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{card.name}, {byte_size(card.total_memory)}, capability {card.major}.{card.minor}"
    yield "trains on", choose_device().reason


def _libraries() -> Iterator[tuple[str, str]]:
    yield "rankwise", metadata.version("rankwise")
    yield "needed", ", ".join(f"{name} {version or '(missing)'}" for name, version, _ in _requirements())
    for extra in metadata.metadata("rankwise").get_all("Provides-Extra") or ():
        missing = " ".join(wanted for _, _, wanted in _requirements(extra) if wanted)
        if extra not in ("bench", "browser", "dev", "docs"):
            yield extra, f"missing: pip install {missing}" if missing else "installed"


def _requirements(extra: str = "") -> Iterator[tuple[str, str | None, str]]:
    """(name, installed version, what to install if that does not fit) of rankwise itself, or of ``extra`` only."""
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
    level, best = native.level(), native.usable_levels()[-1]
    yield "cpu", level if level == best else f"{level} by RANKWISE_CPU_LEVEL; this processor can run {best}"
    own = "PyTorch's own: no AVX2"
    if products.available():
        bits = products.largest().bit_length() + 1
        own = f"{level}: {'bfloat16' if products.on_tiles() else 'float32'}, and integers of {bits} bits"
    yield "products", own
    missing = attention.missing(torch.bfloat16 if products.on_tiles() else torch.float32)
    yield "attention", level if missing is None else f"PyTorch's own: {missing}"


def _findings() -> Iterator[tuple[str, str]]:
    import torch

    from rankwise.ops import selection
    from rankwise.ops.cpu import native

    if wanted := [wanted for _, _, wanted in _requirements() if wanted]:
        yield "RW790", f"rankwise needs other libraries than are installed; run pip install {' '.join(wanted)}."
    has_card = torch.cuda.is_available()
    if obstacle := (selection.obstacle("triton", "cuda") if has_card else None) or native.obstacle():
        yield "RW608", f"4-bit products run in plain PyTorch, slowly: {obstacle}"
    if shutil.which("nvidia-smi") is not None and not has_card:
        text = f"NVIDIA's driver is installed and torch {torch.__version__} uses no GPU; install torch's build for it"
        yield "RW791", f"{text}: https://pytorch.org/get-started/locally."


COMMAND = Command(
    name="doctor",
    settings=Settings,
    run=run,
    summary="Say what this machine has: devices, libraries, which kernels run and why, what to install.",
    examples=("rankwise doctor", "rankwise doctor --json"),
    exit_code=lambda document: 2 if any(found["code"] == "RW790" for found in document["findings"]) else 0,
)
