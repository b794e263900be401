"""A step of DoRA and of QLoRA in units of LoRA's, from the committed measurements.

python article/benchmarks/speed_ratios.py
"""

from __future__ import annotations

from pathlib import Path

STEPS = Path(__file__).parents[2] / "benchmarks" / "results" / "steps.md"


def main() -> None:
    lines = [line.strip("| \n").split(" | ") for line in STEPS.read_text(encoding="utf-8").splitlines()]
    cells = [line for line in lines if len(line) > 5 and line[0] not in ("processor", "---")]
    seconds = {tuple(line[:4]): float(line[4]) for line in cells}
    for method in ("dora", "qlora", "qdora"):
        ratios = [seconds[key] / seconds[*key[:3], "lora"] for key in seconds if key[3] == method]
        print(
            f"{method}: {min(ratios):.2f} to {max(ratios):.2f} of LoRA's seconds on {len(ratios)} processors and dtypes"
        )


if __name__ == "__main__":
    main()
