"""Time and memory of DoRA and of QLoRA in units of LoRA's, from the committed measurements on CPUs.

python article/benchmarks/speed_ratios.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "article" / "table" / "speed.json"


def figures(file: Path, column: int, *, inverse: bool = False) -> list[dict[str, float]]:
    """For each processor, dtype and size of the file's table {method: the column's figure, or 1 / it}."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        cells = line.strip("| \n").split(" | ")
        if len(cells) > column and cells[3] in ("lora", "dora", "qlora", "qdora"):
            figure = float(cells[column].replace(",", ""))
            found.setdefault(tuple(cells[:3]), {})[cells[3]] = 1 / figure if inverse else figure
    return list(found.values())


def steps(file: Path) -> list[dict[str, float]]:
    """For each row of the file's first table {method: the step's time in units of the frozen products}."""
    rows = [line.strip("| ").split(" | ") for line in file.read_text(encoding="utf-8").split("\n## ")[0].splitlines()]
    figures = [cells[2:] for cells in rows if len(cells) == 6 and cells[1] in ("int8", "bfloat16")]
    return [dict(zip(("lora", "qlora", "dora", "qdora"), map(float, row))) for row in figures]


def main() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))["examples_per_second"]
    times = {
        "a step (eight_bits.md)": steps(RESULTS / "eight_bits.md"),
        "training examples, end to end (end_to_end.md)": figures(RESULTS / "end_to_end.md", 5, inverse=True),
        "training examples, table 1": [{method: 1 / speed for method, speed in table.items()}],
    }
    for method in ("dora", "qlora", "qdora"):
        every: list[float] = []
        for name, runs in times.items():
            ratios = [run[method] / run["lora"] for run in runs]
            every += ratios
            print(f"{method}, {name}: {min(ratios):.2f} to {max(ratios):.2f} of LoRA's time, setups: {len(ratios)}")
        print(f"{method}: {min(every):.2f} to {max(every):.2f} of LoRA's time")
        peaks = [run[method] / run["lora"] for run in figures(RESULTS / "end_to_end.md", 12)]
        print(f"{method}: {min(peaks):.2f} to {max(peaks):.2f} of LoRA's peak memory (end_to_end.md)")


if __name__ == "__main__":
    main()
