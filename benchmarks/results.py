"""Where results lie and what each says about its origin.

A run of a benchmark is one JSON file in ``benchmarks/results``; ``SUBJECT.md`` beside it is made from all runs of a
subject, a processor a column or a row. Records name the commit of the tree that was measured; those of before December
3, 2026, name the one that added them, since they knew only the version of an older installation.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rankwise.records import write_json, write_text

FOLDER = Path(__file__).parent / "results"
# Of x86 processors what decides the speed of products, the fastest first: the name, and the flag of /proc/cpuinfo.
INSTRUCTIONS = {"AMX": "amx_bf16", "AVX-512 BF16": "avx512_bf16", "AVX-512": "avx512f", "AVX2": "avx2"}

# Environment variables that limit the instruction sets of rankwise, oneDNN, PyTorch and MKL.
LIMITS = ("RANKWISE_CPU_LEVEL", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")

# What a tree without git calls itself (pyproject.toml, fallback_version), whatever its commit.
UNVERSIONED = "0.1.0"

Run = dict[str, Any]
PACKAGES = ("rankwise", "torch", "transformers", "peft", "bitsandbytes", "trl", "triton", "unsloth")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """None for what is not installed; of rankwise the commit of this tree, since an installation in place keeps the
    version of the day it was made."""
    found = {package: _version(package) for package in packages}
    return found | ({"rankwise": commit() or found["rankwise"]} if "rankwise" in found else {})


def commit() -> str:
    """Of this tree, short; empty without git."""
    command = ["git", "-C", str(FOLDER), "rev-parse", "--short=8", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """In words: no names of hosts or folders."""
    return {
        "processor": _cpuinfo("model name") or platform.machine(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "python": platform.python_version(),
    }


def _cpuinfo(key: str) -> str:
    """The first value of ``key``; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _instructions() -> str:
    limits = {_for_files(name): f"limited to {name}" for name in INSTRUCTIONS}
    if limit := limits.get(os.environ.get("RANKWISE_CPU_LEVEL", "")):
        return limit
    flags = set(_cpuinfo("flags").split())
    return next((name for name, flag in INSTRUCTIONS.items() if flag in flags), platform.machine())


def _for_files(words: str) -> str:
    return words.lower().replace("-", "").replace(" ", "_")


def _memory_gb() -> float | None:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not hasattr(os, "sysconf") or not set(names) <= os.sysconf_names.keys():
        return None
    page, pages = map(os.sysconf, names)
    return round(page * pages / 1e9, 1)


def command() -> str:
    """The command line of this process with what limits its instruction sets, folders of this machine left out."""
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    parts = [Path(part).name if os.path.isabs(part) else part for part in sys.argv[1:]]
    return " ".join([*limits, "python", f"benchmarks/{Path(sys.argv[0]).name}", *parts])


def processor(run: Run) -> str:
    """``Intel Xeon, AMX``: what a column or a row of a page is called."""
    about = run["machine"]
    words = about["processor"].replace("(R)", "").removesuffix(" Processor")
    return ", ".join(filter(None, (words, about.get("instructions"))))


def where_from(runs: Iterable[Run]) -> list[str]:
    """Markdown: machine, versions, command and notes of each run."""
    lines = []
    for run in runs:
        about = run["machine"]
        installed = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
        if run["versions"].get("rankwise") == UNVERSIONED:
            installed = installed.replace(UNVERSIONED, f"{UNVERSIONED} (commit unknown)", 1)
        memory = f", {about['memory_gb']} GB" if about.get("memory_gb") else ""
        lines.append(
            f"- **{processor(run)}** ({about['cores']} cores, {about['threads']} threads{memory}), Python "
            f"{about['python']}; {installed}: `{run['command']}`"
        )
        lines += [f"  {note}" for note in run.get("notes", ())]
    return [*lines, ""]


def row_name(run: Run) -> tuple[str, str]:
    """The first two cells of a row: processor and dtype."""
    return processor(run), run["dtype"]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(headings), _row(["---"] * len(headings)), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def judged(value: float | None, goal: float | None, *, at_most: bool, digits: int = 2) -> str:
    """The value with its goal, and whether it was kept."""
    if value is None or goal is None:
        return number(value, digits)
    kept = value <= goal if at_most else value >= goal
    return f"{value:.{digits}f} ({'<=' if at_most else '>='} {goal:g}: {'kept' if kept else 'missed'})"


def publish(output: Path, subject: str, run: Run, page: Callable[[list[Run]], list[str]], name: str = "") -> None:
    """Write the run as OUTPUT/SUBJECT_NAME.json, and OUTPUT/SUBJECT.md, the page of all runs of the subject."""
    output.mkdir(parents=True, exist_ok=True)
    stem = name or usual_name(subject, run)
    # runs_of finds no other names.
    if stem != subject and not stem.startswith(f"{subject}_"):
        stem = f"{subject}_{stem}"
    write_json(output / f"{stem}.json", run)
    lines = page(runs_of(subject, output))
    write_text(output / f"{subject}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def usual_name(subject: str, run: Run) -> str:
    """``steps_avx2_float32``."""
    words = [subject, _for_files(run["machine"]["instructions"]).removeprefix("limited_to_")]
    return "_".join([*words, *(run[key] for key in ("dtype",) if run.get(key, "bfloat16") != "bfloat16")])


def runs_of(subject: str, folder: Path) -> list[Run]:
    """All runs of a subject, the processor with the fastest instructions first, bfloat16 before float32."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{subject}_*.json"))]
    order = list(INSTRUCTIONS)
    return sorted(found, key=lambda run: (order.index(_known(run, order)), run.get("dtype", "")))


def _known(run: Run, order: list[str]) -> str:
    name = run["machine"].get("instructions", "").removeprefix("limited to ")
    return name if name in order else order[-1]


def sections(page: Callable[[Run], list[str]]) -> Callable[[list[Run]], list[str]]:
    """A page with a section a run, for tables that say nothing side by side."""
    return lambda runs: [line for run in runs for line in page(run)]
