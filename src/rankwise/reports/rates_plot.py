"""The result of the learning-rate search: a line for each method over the rates tried, with a ring at the chosen
rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from rankwise.reports.figure import Frame, dot, group, label, marker
from rankwise.reports.folder import Comparison
from rankwise.reports.naming import method_name
from rankwise.reports.numbers import is_number, rate, significant
from rankwise.reports.scale import spread, value_range

HEIGHT = 190
LABEL_GAP = 15


def rates_svg(comparison: Comparison, numbers: Mapping[str, int]) -> Markup | None:
    """The plot; None when no method tried more than one rate."""
    tried = {name: _points(search) for name, search in comparison["learning_rates"].items()}
    tried = {name: points for name, points in tried.items() if points}
    rates = sorted({x for points in tried.values() for x, _ in points})
    if len(rates) < 2:
        return None
    heights = [value for points in tried.values() for _, value in points]
    frame = Frame.of(value_range(rates, air=0.05), value_range(heights), HEIGHT)
    ends = [frame.y(points[-1][1]) for points in tried.values()]
    places = spread(ends, LABEL_GAP, 4, HEIGHT)
    lines = [
        group(
            f"m{numbers[name]}",
            frame.curve(points, "evaluation"),
            *(_mark(frame, numbers[name], name, point) for point in points),
            _chosen(frame, comparison["learning_rates"][name], points),
            label(frame.x(points[-1][0]), y + 4, method_name(name), "name halo", dx=10),
        )
        for (name, points), y in zip(tried.items(), places)
    ]
    texts = [rate(10**x) for x in rates]
    axis = frame.base(rates, texts)
    return frame.svg("evaluation loss against learning rate", frame.grid(), axis, *lines, below=26, right=76)


def _points(search: Mapping[str, object]) -> list[tuple[float, float]]:
    """(log10 of the rate, loss)."""
    tried = search.get("tried")
    found = []
    for item in tried if isinstance(tried, Sequence) else []:
        x, value = item.get("learning_rate"), item.get("value")
        if is_number(x) and x > 0 and is_number(value):
            found.append((math.log10(x), value))
    return sorted(found)


def _mark(frame: Frame, number: int, name: str, point: tuple[float, float]) -> Markup:
    tip = f"{method_name(name)} at {rate(10 ** point[0])}: {significant(point[1], 4)}"
    return marker(number, frame.x(point[0]), round(frame.y(point[1]), 1), tip=tip)


def _chosen(frame: Frame, search: Mapping[str, object], points: Sequence[tuple[float, float]]) -> Markup:
    chosen = search.get("chosen")
    if not is_number(chosen) or chosen <= 0:
        return Markup("")
    near = [point for point in points if abs(point[0] - math.log10(chosen)) < 1e-9]
    return Markup("").join(dot(frame.x(x), round(frame.y(y), 1), 9, "ring") for x, y in near)
