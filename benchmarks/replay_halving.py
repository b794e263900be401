"""What `--budget` would have chosen in a finished comparison that tried every rate at full length.

    rankwise compare --model M --data D --learning-rates 1e-4,1e-3,1e-2 --eval-steps 5 --output grid
    python benchmarks/replay_halving.py grid [--against halved]

Each round's judgement is read from the recorded evaluations of seed 0, between two of them by a straight line. This is
harder for the search than its own short runs are: a recorded run is cut off before its schedule decays. ``--against``
names the folder of the same comparison with `--budget`, whose real search and recommendation are shown beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.comparison.stages import Cell
from rankwise.foreign import read_json
from rankwise.records import read_metrics
from rankwise.training.rate_search import rounds

# Steps of a run, and its loss at each.
Curve = tuple[Sequence[int], Sequence[float]]


def curve_of(folder: Path) -> Curve:
    """The evaluations of a run; a run that diverged has the loss infinity from then on."""
    found = {line["step"]: line["eval_loss"] for line in read_metrics(folder) if line.get("eval_loss") is not None}
    if not found:
        return [0], [float("inf")]
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def replayed(curves: Mapping[float, Curve], steps: int, budget: float) -> tuple[float, int]:
    """The rate that is left, and the steps of all short runs together."""
    left, taken = sorted(curves), 0
    for count, length in rounds(len(curves), round(budget * steps)):
        left = left[:count]
        left.sort(key=lambda rate: float(np.interp(length, *curves[rate])))
        taken += length * len(left)
    return left[0], taken


def of_method(folder: Path, method: str, rates: Sequence[float], steps: int, budget: float) -> dict[str, Any]:
    curves = {rate: curve_of(Cell(method, rate, 0).folder(folder)) for rate in sorted(rates)}
    final = {rate: min(losses) for rate, (_, losses) in curves.items()}
    best = min(final, key=lambda rate: final[rate])
    chosen, taken = replayed(curves, steps, budget)
    return {
        "grid": {"rate": best, "loss": final[best], "steps": steps * len(rates)},
        "replayed": {"rate": chosen, "loss": final[chosen], "steps": taken},
        "excess": final[chosen] / final[best] - 1,
        "losses": final,
    }


def replay(folder: Path, budget: float) -> dict[str, Any]:
    """The replay of every method, and the method of the lowest loss by the grid's rates and by the replayed ones."""
    comparison = read_json(folder / "comparison.json")
    methods = {name: found["search"]["tried"] for name, found in comparison["methods"].items()}
    rates = {name: [item["learning_rate"] for item in tried] for name, tried in methods.items()}
    steps = {name: max(item["steps"] or 0 for item in tried) for name, tried in methods.items()}
    rows = {name: of_method(folder, name, rates[name], steps[name], budget) for name in methods}
    first = {way: min(rows, key=lambda name: rows[name][way]["loss"]) for way in ("grid", "replayed")}
    return {"methods": rows, "lowest": first, "recommended": comparison["recommendation"]["method"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    found = replay(given.folder, given.budget)
    if given.against is not None:
        halved = read_json(given.against / "comparison.json")
        found["halved"] = {
            "recommended": halved["recommendation"]["method"],
            "rates": {name: item["search"]["chosen"] for name, item in halved["methods"].items()},
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
