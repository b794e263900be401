"""Draw ``architecture.svg``, the picture of the packages, from the layers that import-linter holds us to.

python docs/_ext/layers.py
"""

from __future__ import annotations

import tomllib
from pathlib import Path

WIDTH, ROW, GAP, TOP = 760, 46, 10, 6
LAYERS = "Layers point one way"
STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1b2a41;text-anchor:middle}"
    "rect{fill:#eef3fb;stroke:#7a93bd;rx:6}"
    "@media(prefers-color-scheme:dark){text{fill:#e8eefc}rect{fill:#1d2a40;stroke:#6f8bbd}}"
)


def picture(pyproject: Path) -> str:
    """The SVG: a row for each layer, a box for each package in it."""
    contracts = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == LAYERS)
    rows = [[package.strip(" ()").removeprefix("rankwise.") for package in layer.split("|")] for layer in layers]
    boxes = [
        box for number, packages in enumerate(rows) for box in _row(packages, TOP + number * (ROW + GAP), WIDTH - 130)
    ]
    height = TOP + len(rows) * (ROW + GAP)
    # They use only the base, which is the last four layers.
    tall = height - 4 * (ROW + GAP) - TOP - GAP
    beside = _box("data", WIDTH - 115, TOP, 50, tall)
    beside += _box("reports", WIDTH - 60, TOP, 56, tall)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    return f"{head}<style>{STYLE}</style>{''.join(boxes)}{beside}</svg>\n"


def _row(packages: list[str], y: float, width: float) -> list[str]:
    # Long names get wider boxes.
    total = sum(len(package) + 4 for package in packages)
    boxes, x = [], 4.0
    for package in packages:
        share = (width - GAP * (len(packages) - 1)) * (len(package) + 4) / total
        boxes.append(_box(package, x, y, share, ROW))
        x += share + GAP
    return boxes


def _box(name: str, x: float, y: float, width: float, height: float) -> str:
    middle = f'x="{x + width / 2:.0f}" y="{y + height / 2 + 5:.0f}"'
    rect = f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}"/>'
    return f"{rect}<text {middle}>{name}</text>"


if __name__ == "__main__":
    ROOT = Path(__file__).parents[2]
    (ROOT / "docs" / "architecture.svg").write_text(picture(ROOT / "pyproject.toml"), encoding="utf-8")
