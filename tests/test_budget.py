"""The project fits ``budget.toml``; ``make budget`` prints what it measures beside its ceilings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"[\"'](RW[1-9]\d\d)[\"']")
SOURCES = {".py", ".cpp", ".hpp", ".h", ".inc"}


def measured(unit: str, place: str) -> int:
    """What ``place``, a folder or pyproject.toml, has of ``unit``."""
    if unit == "dependencies":
        return len(tomllib.loads((ROOT / place).read_text(encoding="utf-8"))["project"]["dependencies"])
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / place).rglob("*") if path.suffix in SOURCES]
    figures = {"files": len(texts), "lines": sum(text.count("\n") for text in texts)}
    return (figures | {"codes": len({code for text in texts for code in CODE.findall(text)})})[unit]


def test_the_tree_fits_the_budget():
    ceilings = tomllib.loads((ROOT / "budget.toml").read_text(encoding="utf-8"))
    over = []
    for unit, places in ceilings.items():
        for place, ceiling in places.items():
            figure = measured(unit, place)
            print(f"{place:14} {figure:>7,} {unit:12} of {ceiling:,}")
            over += [f"{place}: {figure} {unit}, budget {ceiling}"] * (figure > ceiling)
    assert not over, f"{over}: make room, or raise budget.toml and say why in the commit's body"
