"""The regret of the default learning rate on grids of rates: how far it ends above the best rate that was tried.

    python benchmarks/default_rates.py MODEL train.jsonl eval.jsonl --name e2e --rates 2e-4,6e-4,1.3e-3,3e-3
    python benchmarks/default_rates.py --list FOLDER --e2e FOLDER --instructions FOLDER --grids 2

Trains once at each rate, and adds the grid to those in benchmarks/results, where grids of our reports and of
tinker-cookbook's sweep lie too. Makes benchmarks/results/default_rates.md anew.

The list was written before the first of its grids ran, and is ordered so that any beginning of it is a table already.
FOLDER holds evidence.py's models; the other two hold E2E's trainset.csv and devset.csv, and LLaMA-Factory's
alpaca_en_demo.json and identity.json, whose answers are nearly alike. Each grid is the default rate, half a decade
less, and half a decade and a decade more.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import contenders
import results
from evidence import MODELS

import rankwise as rw
from rankwise.config import TrainSettings, variant_of
from rankwise.default_rate import default_rate
from rankwise.models import fetch_model
from rankwise.planning.facts import read_model
from rankwise.reports.numbers import rate as spelled
from rankwise.training.run import train
from rankwise.training.watch import Diverged

FILE = results.FOLDER / "default_rates_all.json"
# Grids of a source on the page.
MOST_ROWS = 6
BEFORE = 2e-4
LIST = "Qwen2.5-Coder-Instruct: the list"
# {data: (rows for training, for evaluation, max_length)}.
DATA = {"e2e": (400, 64, 160), "verbatim": (80, 11, 160), "instructions": (400, 64, 256), "pairs": (400, 64, 160)}
STEPS, ROWS = 40, 4
# Training losses of so many first steps are kept: do they tell that the default will be bad?
FIRST = 12
Grid = dict[str, Any]
# A grid, its default rate, that rate's regret, and that of 2e-4.
Judged = tuple[Grid, float, float, float | None]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A grid of the list."""

    model: str
    method: str
    data: str
    objective: str = "sft"

    def is_of(self, grid: Grid) -> bool:
        return grid["source"] == LIST and (grid["model"], grid["method"], grid["data"]) == dataclasses.astuple(self)[:3]


def cells() -> Iterator[Cell]:
    """LoRA on all data, the larger model, all weights, the other methods, preferences."""
    demonstrations = [name for name in DATA if name != "pairs"]
    yield from (Cell("0.5B", "lora", data) for data in demonstrations)
    yield from (Cell("1.5B", "lora", data) for data in demonstrations[:2])
    yield from (Cell("0.5B", method, data) for method in ("full", "dora", "qlora") for data in demonstrations)
    yield Cell("0.5B", "lora", "pairs", "dpo")


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    if given.list is None:
        grid_of_one(given)
    else:
        grids_of_list(given)


def grids_of_list(given: argparse.Namespace) -> None:
    about = {"machine": results.machine(), "versions": results.versions()}
    grids = json.loads(FILE.read_text(encoding="utf-8"))["grids"]
    left = [cell for cell in cells() if not any(cell.is_of(grid) for grid in grids)]
    for cell in left[: given.grids]:
        print(cell, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as place:
            grid = {**_measured(cell, given, Path(place)), "commit": about["versions"]["rankwise"]}
        run = json.loads(FILE.read_text(encoding="utf-8"))
        grid["processor"] = results.processor(about)
        results.publish(given.output, "default_rates", run | {"grids": [*run["grids"], grid]}, page, "all")


def _measured(cell: Cell, given: argparse.Namespace, place: Path) -> Grid:
    count, held_out, max_length = DATA[cell.data]
    files = [str(place / name) for name in ("train.jsonl", "eval.jsonl")]
    for file, rows in zip(files, _rows(cell.data, count, held_out, given)):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = str(place / "model")
    model, tokenizer = rw.load_model(str(given.list / MODELS[cell.model]))
    assert tokenizer is not None, "the file has one"
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    del model
    read = read_model(fetch_model(folder, weights=False))
    facts = {"family": read.family, "width": read.facts.width}
    default = default_rate(*facts.values(), {"objective": cell.objective, "method": cell.method}).rate
    grid: Grid = {"source": LIST, **dataclasses.asdict(cell), **facts, "steps": STEPS, "batch": ROWS, "losses": {}}
    for times in (-1, 0, 1, 2):
        rate = float(f"{default * 10 ** (times / 2):.1e}")
        settings = {"model": folder, "data": files[0], "eval_data": files[1], "output": f"{place}/run{times}"}
        settings |= {"method": cell.method, "objective": cell.objective, "learning_rate": rate, "max_steps": STEPS}
        settings |= {"batch_size": ROWS, "max_length": max_length, "eval_steps": STEPS, "logging_steps": 1}
        try:
            record = train(TrainSettings.model_validate(settings))
        except Diverged:
            grid["losses"][spelled(rate)] = None
            continue
        lines = Path(settings["output"], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        first = [line["loss"] for line in map(json.loads, lines) if "loss" in line][:FIRST]
        grid["before"] = record.initial_eval_loss
        grid["losses"][spelled(rate)] = record.eval_loss
        grid.setdefault("first_steps", {})[spelled(rate)] = first
    return grid


def _rows(data: str, count: int, held_out: int, given: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """(rows for training, for evaluation), spread evenly over the files."""
    if data in ("e2e", "pairs"):
        parts = []
        for name, asked in (("trainset.csv", count), ("devset.csv", held_out)):
            with (given.e2e / name).open(encoding="utf-8", newline="") as file:
                found = list(csv.DictReader(file))
            parts.append(found[:: len(found) // asked][:asked])
    else:
        name = {"instructions": "alpaca_en_demo.json", "verbatim": "identity.json"}[data]
        found = json.loads((given.instructions / name).read_text(encoding="utf-8"))
        # Of every so many rows one is held out.
        every = len(found) // held_out
        parts = [[row for place, row in enumerate(found) if place % every][:count], found[::every][:held_out]]
    if data == "pairs":
        # The better answer is the row's own, the worse one another row's.
        parts = [
            [
                {"prompt": row["mr"], "chosen": row["ref"], "rejected": other["ref"]}
                for row, other in zip(rows, [*rows[1:], rows[0]])
            ]
            for rows in parts
        ]
    return parts[0], parts[1]


def grid_of_one(given: argparse.Namespace) -> None:
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
        parser.add_argument(name, nargs="?")
    parser.add_argument("--list", type=Path, metavar="FOLDER", help="run what is left of the list")
    parser.add_argument("--e2e", type=Path, metavar="FOLDER")
    parser.add_argument("--instructions", type=Path, metavar="FOLDER")
    parser.add_argument("--grids", type=int, default=sys.maxsize, help="of the list, no more than so many")
    parser.add_argument("--name", help="of the data, in the table")
    parser.add_argument("--method", default="lora", help="as in `rankwise compare`: lora, full, lora+plus")
    parser.add_argument("--rates", default="2e-4,6e-4,1.3e-3,3e-3")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args(arguments)
    needed = ("e2e", "instructions") if given.list else ("model", "data", "eval_data", "name")
    if missing := [name for name in needed if getattr(given, name) is None]:
        parser.error(f"give {', '.join(missing)} too.")
    return given


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
    lines += ["", f"## {LIST}", "", *_table_of_list(judged)]
    for source in dict.fromkeys(grid["source"] for grid in run["grids"] if grid["source"] != LIST):
        here = [item for item in judged if item[0]["source"] == source]
        worst = sorted(here, key=lambda item: item[2], reverse=True)[:MOST_ROWS]
        lines += ["", f"## {source}", "", *_table(worst), "", f"{len(here)} grids. {_summary(here)}"]
    return lines


def _table_of_list(judged: Sequence[Judged]) -> list[str]:
    done = {cell: item for cell in cells() for item in judged if cell.is_of(item[0])}
    headings = ("model", "data", "method", "loss before", "best loss", "best rate", "default", "regret", "of 2e-4")
    rows = []
    for cell in cells():
        name = [cell.model, cell.data, cell.method if cell.objective == "sft" else f"{cell.method}, {cell.objective}"]
        if cell not in done:
            rows.append([*name, "not run yet", *[""] * (len(headings) - 4)])
            continue
        grid, rate, own, before = done[cell]
        best, loss = min(_losses(grid).items(), key=lambda item: item[1])
        known = ["" if before is None else f"{before:.1%}"]
        found = [f"{grid['before']:.3f}", f"{loss:.3f}", spelled(best), spelled(rate), f"{own:.1%}", *known]
        rows.append([*name, *found])
    commits = sorted({item[0]["commit"] for item in done.values()})
    words = f"{len(done)} of {len(rows)} grids have run"
    if done:
        processors = sorted({item[0]["processor"] for item in done.values()})
        words += f", at {', '.join(commits)}, on {' and '.join(processors)}. {_summary([*done.values()])}"
    return [
        f"{STEPS} steps of {ROWS} rows in the products of `--products auto`, rates half a decade apart: one below the "
        "default of that time, and two above. That of all weights was three times as high; today's was fitted on the "
        "three grids here, and tried on three of Gemma. No other default was fitted on these.",
        "",
        *results.table(headings, rows),
        "",
        words if done else f"{words}.",
    ]


def _losses(grid: Grid) -> dict[float, float]:
    """{rate: loss}; without end for a run that diverged."""
    return {float(tried): math.inf if loss is None else loss for tried, loss in grid["losses"].items()}


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
    return f"Default: {figures([item[2] for item in judged])}. 2e-4: {figures(before)}."


def default_of(grid: Grid) -> float:
    method, changes = variant_of(grid["method"])
    settings = {"objective": grid.get("objective", "sft"), **changes, "method": method}
    return default_rate(grid["family"], grid["width"], settings).rate


def regret(grid: Grid, rate: float) -> float | None:
    """None for a rate beyond the grid."""
    losses = _losses(grid)
    if not min(losses) <= rate <= max(losses):
        return None
    low, high = max(tried for tried in losses if tried <= rate), min(tried for tried in losses if tried >= rate)
    share = math.log(rate / low) / math.log(high / low) if low < high else 0.0
    return ((1 - share) * losses[low] + share * losses[high]) / min(losses.values()) - 1


if __name__ == "__main__":
    main()
