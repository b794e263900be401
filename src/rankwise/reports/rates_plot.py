"""Searches of the learning rate: the loss over the rates tried, with a ring at the chosen one.

A comparison has a line for each method, the search of ``--learning-rate auto`` one for each round of its short runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from rankwise.foreign import Fields, Json
from rankwise.records import RateSearch
from rankwise.reports.figure import Frame, document, group, label
from rankwise.reports.folder import Comparison
from rankwise.reports.naming import method_name
from rankwise.reports.numbers import is_number, plural, rate, significant
from rankwise.reports.scale import Point, spread, value_range

HEIGHT = 190
# Pixels above the plot, and its height, in a file of its own.
TOP, OWN_HEIGHT = 78, 260
LABEL_GAP = 16


@dataclasses.dataclass(frozen=True)
class _Line:
    """(log10 of the rate, loss) of one method or round, by rising rate; ``number`` is that of its colour and marker."""

    number: int
    name: str
    points: Sequence[Point]
    chosen: float | None = None
    # Losses above this are drawn at this height.
    top: float = math.inf

    def drawn(self, frame: Frame, label_y: float) -> Markup:
        shown = [(x, min(y, self.top)) for x, y in self.points]
        tips = [f"{self.name} at {rate(10**x)}: {significant(y, 4)}" for x, y in self.points]
        rings = [point for point in shown if self.chosen and abs(point[0] - math.log10(self.chosen)) < 1e-9]
        return group(
            f"m{self.number}",
            frame.curve(shown, "evaluation"),
            *(frame.marker(self.number, point, tip) for point, tip in zip(shown, tips)),
            *(frame.dot(point, 9, "ring") for point in rings),
            label(frame.x(shown[-1][0]), label_y + 4, self.name, "name halo", dx=10),
        )


def rates_svg(comparison: Comparison, numbers: Mapping[str, int]) -> Markup | None:
    """The plot of a comparison; None when no method tried more than one rate."""
    searches = comparison["learning_rates"]
    lines = [
        _Line(numbers[name], method_name(name), points, _positive(search.get("chosen")))
        for name, search in searches.items()
        if (points := _points(search.get("tried"), "value"))
    ]
    rates = sorted({x for line in lines for x, _ in line.points})
    if len(rates) < 2:
        return None
    frame, parts = _drawn(lines, rates, HEIGHT)
    return frame.svg("evaluation loss against learning rate", *parts, below=26, right=76)


def search_svg(search: RateSearch, title: str) -> str:
    """The search of a run as one self-contained SVG. Rates that diverged have no point."""
    rounds = itertools.groupby(search["trials"], key=lambda trial: trial["steps"])
    found = [(steps, points) for steps, trials in rounds if (points := _points(list(trials), "loss"))]
    # A nearly diverged loss would flatten the others, so its point is drawn at the top.
    top = 2 * min((loss for _, points in found for _, loss in points), default=1.0)
    last = len(found) - 1
    lines = [
        _Line(number % 8, plural(steps, "step"), points, search["chosen"] if number == last else None, top)
        for number, (steps, points) in enumerate(found)
    ]
    rates = sorted({math.log10(trial["learning_rate"]) for trial in search["trials"]})
    _, parts = _drawn(lines, rates, OWN_HEIGHT)
    rows = plural(search["rows"], "training row")
    caption = f"loss on {rows} that the short runs did not see; chosen: {rate(search['chosen'])}"
    return document(TOP, OWN_HEIGHT, title, caption, *parts)


def _points(tried: object, key: str) -> list[Point]:
    trials: Sequence[Fields] = tried if isinstance(tried, Sequence) else []
    pairs = [(_positive(trial.get("learning_rate")), trial.get(key)) for trial in trials]
    return sorted((math.log10(x), value) for x, value in pairs if x is not None and is_number(value))


def _positive(value: Json) -> float | None:
    return value if is_number(value) and value > 0 else None


def _drawn(lines: Sequence[_Line], rates: Sequence[float], height: int) -> tuple[Frame, list[Markup]]:
    values = [min(y, line.top) for line in lines for _, y in line.points]
    frame = Frame.of(value_range(rates, air=0.05), value_range(values), height)
    ends = spread([frame.y(min(line.points[-1][1], line.top)) for line in lines], LABEL_GAP, 4, height)
    axis = frame.base(rates, [rate(10**x) for x in rates])
    return frame, [frame.grid(), axis, *(line.drawn(frame, end) for line, end in zip(lines, ends))]
