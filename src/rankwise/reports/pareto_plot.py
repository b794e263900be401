"""Quality against cost: a point for each method, bars for the uncertainty, and the Pareto line.

The Pareto line joins the methods that no other one beats in both. It is a step, because no method lies between two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rankwise.reports.figure import Box, Frame, group, label, line, marker, place_text, text_box
from rankwise.reports.folder import Comparison
from rankwise.reports.naming import method_name
from rankwise.reports.numbers import half_width, is_above, is_number
from rankwise.reports.scale import nice_ticks, tick_label, value_range

HEIGHT = 250
Range = tuple[float, float]
# Width of the plot on a phone, in pixels. Labels are placed so that they do not overlap at this width.
NARROW = 250.0
# Places of a label, the better one first.
PLACES = ((8, -7, "start"), (-8, -7, "end"), (8, 17, "start"), (-8, 17, "end"), (9, 4, "start"), (-9, 4, "end"))
# Places where points are close together: further away, joined to the point by a line.
FAR = tuple((dx, dy, anchor) for dy in (-24, -38, -52, -66, 34) for dx, anchor in ((3, "start"), (-3, "end")))


@dataclasses.dataclass(frozen=True)
class Spot:
    """The cost and quality of one method, and the ranges of both where they are known."""

    method: str
    cost: float
    quality: float
    cost_range: Range
    quality_range: Range | None
    # Costs count as equal where these ranges overlap; None where they cannot be compared.
    told_apart: Range | None = None


def spots_of(comparison: Comparison, cost: str, scale: float) -> list[Spot]:
    """The methods that have both figures. ``cost`` is a name of a cost, and is divided by ``scale``."""
    found = []
    for name in comparison.with_result():
        facts = comparison["methods"][name]
        if not is_number(facts[cost]):
            continue
        low, high = facts["ranges"].get(cost) or (facts[cost], facts[cost])
        told_apart = facts["costs"].get(cost)
        found.append(
            Spot(
                name,
                facts[cost] / scale,
                facts["mean"][comparison.metric],
                (low / scale, high / scale),
                _bounds(facts["interval"].get(comparison.metric)),
                None if told_apart is None else (told_apart[0] / scale, told_apart[1] / scale),
            )
        )
    return found


def _bounds(interval: Any) -> Range | None:
    return None if half_width(interval) is None else (interval[0], interval[1])


def pareto_front(spots: Sequence[Spot], *, higher_is_better: bool) -> list[Spot]:
    """The spots that no other one beats, by rising cost.

    A spot beats another if it is nowhere worse and better in cost or quality. Costs differ where their ranges do not
    overlap, as in the recommendation.
    """
    sign = 1 if higher_is_better else -1

    def is_worse(a: Spot, b: Spot) -> bool:
        return sign * a.quality < sign * b.quality or is_above(a.told_apart, b.told_apart)

    front = [spot for spot in spots if not any(is_worse(spot, other) and not is_worse(other, spot) for other in spots)]
    return sorted(front, key=lambda spot: (spot.cost, -sign * spot.quality))


def pareto_svg(
    spots: Sequence[Spot],
    numbers: Mapping[str, int],
    description: str,
    *,
    higher_is_better: bool,
    limit: float | None = None,
) -> Markup:
    """The plot. ``limit`` is the user's limit, and is drawn if it lies within the plot."""
    frame = _frame(spots, limit)
    ticks = nice_ticks(frame.x.low, frame.x.high, 4)
    return frame.svg(
        description,
        frame.grid(),
        frame.base(ticks, [tick_label(tick, ticks) for tick in ticks]),
        _limit(frame, limit),
        _front(pareto_front(spots, higher_is_better=higher_is_better), frame),
        *(_spot(spot, frame, numbers[spot.method]) for spot in spots),
        *_labels(spots, frame, numbers),
        below=26,
        left=52,
        right=20,
    )


def _frame(spots: Sequence[Spot], limit: float | None) -> Frame:
    costs = [value for spot in spots for value in spot.cost_range]
    low, high = value_range(costs, air=0.16)
    if limit is not None and low < limit < high + 0.5 * (high - low):
        high = max(high, limit + 0.06 * (high - low))
    heights = [value for spot in spots for value in (spot.quality, *(spot.quality_range or ()))]
    return Frame.of((max(low, 0.0), high), value_range(heights, air=0.12), HEIGHT)


def _limit(frame: Frame, limit: float | None) -> Markup:
    if limit is None or not frame.x.low < limit < frame.x.high:
        return Markup("")
    x = frame.x(limit)
    return line(x, 0, x, HEIGHT, "limit") + label(x, 11, "your limit", "tick halo", dx=-5, anchor="end")


def _front(front: Sequence[Spot], frame: Frame) -> Markup:
    """The line from each method across to the cost of the next and then to its quality, open to the right."""
    parts = []
    for spot, after in zip(front, [*front[1:], None]):
        end = 100.0 if after is None else frame.x(after.cost)
        y = round(frame.y(spot.quality), 1)
        parts.append(line(frame.x(spot.cost), y, end, y, "front"))
        if after is not None:
            parts.append(line(end, y, end, round(frame.y(after.quality), 1), "front"))
    return Markup("").join(parts)


def _spot(spot: Spot, frame: Frame, number: int) -> Markup:
    x, y = frame.x(spot.cost), round(frame.y(spot.quality), 1)
    parts = [line(frame.x(spot.cost_range[0]), y, frame.x(spot.cost_range[1]), y, "error")]
    if spot.quality_range is not None:
        low, high = (round(frame.y(value), 1) for value in spot.quality_range)
        parts.append(line(x, low, x, high, "error"))
    tip = f"{method_name(spot.method)}: {spot.quality:.4g} at {spot.cost:.3g}"
    return group(f"m{number}", *parts, marker(number, x, y, tip=tip))


def _labels(spots: Sequence[Spot], frame: Frame, numbers: Mapping[str, int]) -> list[Markup]:
    """Names beside their points, each at the first place where it overlaps no other name, point or edge."""
    pixels = [(frame.x(spot.cost) / 100 * NARROW, round(frame.y(spot.quality), 1)) for spot in spots]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    found = []
    for spot, (x, y) in zip(spots, pixels):
        name = method_name(spot.method)
        dx, dy, anchor = place_text((x, y), name, (*PLACES, *FAR), taken, (-10.0, 0.0, NARROW + 18, float(HEIGHT)))
        taken.append(text_box(x + dx, y + dy, name, anchor))
        across = frame.x(spot.cost)
        lead = [line(across, y, across, y + dy, "lead")] if (dx, dy, anchor) in FAR else []
        text = label(across, y + dy, name, "name halo", dx=dx, anchor=anchor)
        found.append(group(f"m{numbers[spot.method]}", *lead, text))
    return found
