"""What the project measures, beside ``budget.toml``: lines, files, error codes and direct dependencies.

python dev/budget.py            print both
python dev/budget.py --lower    write the values that fell
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "budget.toml"
CODE = re.compile(r"[\"'](RW[1-9]\d\d)[\"']")


def counted() -> dict[str, dict[str, int]]:
    """Lines, files and distinct error codes by package of ``src/rankwise``, in total, and of ``tests`` and ``csrc``."""
    source = ROOT / "src" / "rankwise"
    groups = {"total": list(source.rglob("*.py")), "base": list(source.glob("*.py"))}
    groups |= {folder.name: list(folder.rglob("*.py")) for folder in sorted(source.iterdir()) if folder.is_dir()}
    figures = {name: _figures(paths) for name, paths in groups.items() if paths}
    for folder, pattern in (("tests", "*.py"), ("csrc", "*.*")):
        figures[folder] = _figures([path for path in (ROOT / folder).rglob(pattern) if path.is_file()])
        del figures[folder]["codes"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return figures | {"dependencies": {"direct": len(project["dependencies"])}}


def _figures(paths: list[Path]) -> dict[str, int]:
    texts = [path.read_text(encoding="utf-8") for path in paths]
    codes = {code for text in texts for code in CODE.findall(text)}
    return {"lines": sum(text.count("\n") for text in texts), "files": len(paths), "codes": len(codes)}


def budget() -> dict[str, dict[str, int]]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def lowered(limits: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> str:
    """The text of ``budget.toml``, its comments kept, with every value at most what was counted."""
    text, section = [], ""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        key, given, _ = line.partition(" = ")
        if section and given and not line.startswith("#"):
            line = f"{key} = {min(limits[section][key], now.get(section, {}).get(key, 0))}"
        text.append(line)
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    now, limits = counted(), budget()
    for name, figures in now.items():
        cells = (f"{figure:>7,} {key} (budget {limits.get(name, {}).get(key, 0):,})" for key, figure in figures.items())
        print(f"{name:14}", *cells)
    if "--lower" in sys.argv[1:]:
        FILE.write_text(lowered(limits, now), encoding="utf-8")
