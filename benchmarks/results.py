"""What every result says about where it comes from, and its two files: JSON and Markdown."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rankwise.records import write_json, write_text

FOLDER = Path(__file__).parents[1] / "docs" / "results"
PACKAGES = ("rankwise", "torch", "transformers", "peft", "bitsandbytes", "trl", "triton", "unsloth")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """None for what is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """In words: no names of hosts or folders."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _memory_gb() -> float | None:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not hasattr(os, "sysconf") or not set(names) <= os.sysconf_names.keys():
        return None
    page, pages = map(os.sysconf, names)
    return round(page * pages / 1e9, 1)


def command() -> str:
    """The command line of this process, folders of this machine left out."""
    parts = [Path(part).name if os.path.isabs(part) else part for part in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *parts])


def where_from(result: dict[str, Any]) -> list[str]:
    """Markdown: command, machine, versions."""
    about, found = result["machine"], result["versions"]
    installed = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    return [
        f"`{result['command']}`",
        "",
        f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, {about['memory_gb']} GB, "
        f"Python {about['python']}; {installed}.",
        "",
    ]


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


def save(folder: Path, name: str, result: dict[str, Any], lines: Sequence[str]) -> None:
    """NAME.json and NAME.md, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result)
    write_text(folder / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
