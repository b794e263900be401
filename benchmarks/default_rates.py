"""The regret of the default learning rate on grids of rates: how far it ends above the best rate that was tried.

    python benchmarks/default_rates.py MODEL train.jsonl eval.jsonl --name e2e --rates 2e-4,6e-4,1.3e-3,3e-3

Trains once at each rate, and adds the grid to those in benchmarks/results, where grids of our reports and of
tinker-cookbook's sweep lie too. Makes benchmarks/results/default_rates.md anew.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders
import results

from rankwise.config import TrainSettings, variant_of
from rankwise.default_rate import default_rate
from rankwise.models import fetch_model
from rankwise.planning.facts import read_model
from rankwise.reports.numbers import rate as spelled
from rankwise.training.run import train

FILE = results.FOLDER / "default_rates_all.json"
# Grids of a source on the page.
MOST_ROWS = 6
BEFORE = 2e-4
Grid = dict[str, Any]
# A grid, its default rate, that rate's regret, and that of 2e-4.
Judged = tuple[Grid, float, float, float | None]


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    model = read_model(fetch_model(given.model, weights=False))
    options = {"max_steps": given.steps, "batch_size": given.batch, "max_length": given.max_length}
    grid: Grid = {
        "source": "benchmarks/default_rates.py",
        "model": Path(given.model).stem,
        "family": model.family,
        "width": model.facts.width,
        "data": given.name,
        "method": given.method,
        "steps": given.steps,
        "batch": given.batch,
        "losses": {spelled(rate): _loss(given, rate, options) for rate in map(float, given.rates.split(","))},
    }
    run = json.loads(FILE.read_text(encoding="utf-8"))
    run |= {"machine": results.machine(), "versions": results.versions(), "grids": [*run["grids"], grid]}
    results.publish(given.output, "default_rates", run, page, "all")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "eval_data"):
        parser.add_argument(name)
    parser.add_argument("--name", required=True, help="of the data, in the table")
    parser.add_argument("--method", default="lora", help="as in `rankwise compare`: lora, full, lora+plus")
    parser.add_argument("--rates", default="2e-4,6e-4,1.3e-3,3e-3")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    return parser.parse_args(arguments)


def _loss(given: argparse.Namespace, rate: float, options: dict[str, int]) -> float | None:
    """The evaluation loss after the last step."""
    method, changes = variant_of(given.method)
    with tempfile.TemporaryDirectory() as place:
        named = {"model": given.model, "data": given.data, "eval_data": given.eval_data, "output": f"{place}/run"}
        settings = {**named, **options, **changes, "method": method, "learning_rate": rate, "eval_steps": given.steps}
        return train(TrainSettings.model_validate(settings)).eval_loss


def page(runs: list[results.Run]) -> list[str]:
    (run,) = runs
    judged: list[Judged] = []
    for grid in run["grids"]:
        rate = default_of(grid)
        own = regret(grid, rate)
        assert own is not None
        judged.append((grid, rate, own, regret(grid, BEFORE)))
    lines = [
        "# The default learning rate on grids of rates",
        "",
        *results.where_from(runs),
        "Regret: how far the evaluation loss at a rate lies above that at the best rate of its grid. It is read on the "
        "straight line between the two rates that were tried beside it, over the logarithm of the rate. The grids with "
        "the largest regrets are listed; the runs' file has all.",
    ]
    for source in dict.fromkeys(grid["source"] for grid in run["grids"]):
        here = [item for item in judged if item[0]["source"] == source]
        worst = sorted(here, key=lambda item: item[2], reverse=True)[:MOST_ROWS]
        lines += ["", f"## {source}", "", *_table(worst), "", _summary(here)]
    return lines


def _table(judged: Sequence[Judged]) -> list[str]:
    headings = ("model, width", "data", "method", "steps x rows", "best rate", "default", "regret", "of 2e-4")
    rows = []
    for grid, rate, own, before in judged:
        best = min(grid["losses"], key=lambda tried, losses=grid["losses"]: losses[tried])
        size = f"{grid['steps']} x {grid['batch']}"
        name = f"{grid['model']}, {grid['width']:,}"
        regrets = (f"{own:.1%}", "not tried" if before is None else f"{before:.1%}")
        rows.append((name, grid["data"], grid["method"], size, best, spelled(rate), *regrets))
    return results.table(headings, rows)


def _summary(judged: Sequence[Judged]) -> str:
    def figures(found: Sequence[float]) -> str:
        return f"median {statistics.median(found):.1%}, worst {max(found):.1%}"

    before = [item[3] for item in judged if item[3] is not None]
    return f"{len(judged)} grids. Default: {figures([item[2] for item in judged])}. 2e-4: {figures(before)}."


def default_of(grid: Grid) -> float:
    method, changes = variant_of(grid["method"])
    return default_rate(grid["family"], grid["width"], {"objective": "sft", **changes, "method": method}).rate


def regret(grid: Grid, rate: float) -> float | None:
    """None for a rate beyond the grid."""
    losses = {float(tried): loss for tried, loss in grid["losses"].items()}
    if not min(losses) <= rate <= max(losses):
        return None
    low, high = max(tried for tried in losses if tried <= rate), min(tried for tried in losses if tried >= rate)
    share = math.log(rate / low) / math.log(high / low) if low < high else 0.0
    return ((1 - share) * losses[low] + share * losses[high]) / min(losses.values()) - 1


if __name__ == "__main__":
    main()
