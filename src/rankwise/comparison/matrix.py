"""The cells of a comparison: its runs, their names and their settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankwise.config import idle_options, variant_of
from rankwise.foreign import Fields, JsonObject
from rankwise.reports.schema import RUNS_FOLDER


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a method, with its variants, at a learning rate with a seed. A ``short`` run only tries a rate, with
    fewer steps. A run without a rate first searches for its rate (``--learning-rate auto``).
    """

    method: str
    learning_rate: float | None
    seed: int
    short: bool = False

    @property
    def id(self) -> str:
        rate = "auto" if self.learning_rate is None else f"lr{self.learning_rate:g}"
        return f"{self.method}-{rate}-seed{self.seed}" + ("-short" if self.short else "")

    def folder(self, output: Path) -> Path:
        return output / RUNS_FOLDER / self.id


def search_cells(method: str, rates: Sequence[float], *, short: bool) -> list[Cell]:
    """The runs that try a method's learning rates, all on seed 0; none if there is only one rate."""
    if len(rates) == 1:
        return []
    return [Cell(method, rate, 0, short) for rate in sorted(rates)]


def final_cells(method: str, rate: float, seeds: int) -> list[Cell]:
    """The final runs. After searches at full length the run of seed 0 exists already and is not repeated."""
    return [Cell(method, rate, seed) for seed in range(seeds)]


def planned_runs(methods: int, rates: int, seeds: int, *, short: bool) -> int:
    """The number of runs of the whole comparison."""
    search = 0 if rates == 1 else rates
    shared = 1 if search and not short else 0
    return methods * (search + seeds - shared)


def choose_rate(losses: Mapping[float, float | None]) -> tuple[float | None, bool]:
    """(rate with the lowest loss, whether it is the lowest or highest of those tried).

    A failed run (None, or a loss that is not finite) is never chosen but counts as tried: a best rate next to a
    diverged one is not at the edge.
    """
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        return None, False
    best = min(sorted(finite), key=lambda rate: finite[rate])
    return best, len(losses) > 1 and best in (min(losses), max(losses))


def cell_settings(cell: Cell, output: Path, shared: Fields, inputs: Fields, steps: int | None) -> JsonObject:
    """The settings file of ``rankwise train`` for a cell. ``inputs``: model, data and eval_data.

    Options without effect on the cell's method are left out.
    """
    method, options = variant_of(cell.method)
    idle: set[str] = set().union(*idle_options(method).values())
    used = {name: value for name, value in shared.items() if name not in idle}
    given = {**used, **inputs, **options, "method": method, "learning_rate": cell.learning_rate, "seed": cell.seed}
    if steps is not None:
        given["max_steps"] = steps
    return {**given, "output": str(cell.folder(output))}
