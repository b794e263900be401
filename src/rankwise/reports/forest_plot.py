"""The forest plot: each method against the best, with a dot for each seed, the mean, its interval, the margin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from rankwise.foreign import Fields, Json
from rankwise.reports.figure import across, dot, line, plot, strip_axis, tag
from rankwise.reports.folder import Comparison
from rankwise.reports.numbers import difference, half_width, is_number, significant
from rankwise.reports.scale import Scale, nice_ticks, tick_label

ROW_HEIGHT = 34
# Pixels: the minimum width of the strip, and the width of a digit.
NARROW, LETTER = 230.0, 6.8
TURNED = {"better": "worse", "worse": "better"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two methods on one metric. ``a`` is the one with the better mean."""

    a: str
    b: str
    metric: str
    difference: float | None
    interval: tuple[float, float] | None
    margin: float | None
    verdict: str
    p_value: float | None
    equivalence_p: float | None
    seed_sd: float | None
    pairs: int
    seeds: int
    per_seed: Mapping[str, float]
    by_example: bool

    @property
    def text(self) -> str:
        """``−0.0212 ± 0.0081``, to the digits that the interval supports."""
        if not is_number(self.difference):
            return "–"
        return " ".join(difference(self.difference, self.interval)).strip()


def pairs_of(comparison: Comparison, metric: str) -> list[Pair]:
    """The differences on ``metric``, the better method first, in the order of the methods' ranks."""
    ranks = {name: index for index, name in enumerate(comparison.ranked())}
    higher = comparison.is_higher_better(metric)
    found = [_pair(item, higher) for item in comparison["differences"] if item["metric"] == metric]
    last = len(ranks)
    return sorted(found, key=lambda pair: (ranks.get(pair.a, last), ranks.get(pair.b, last)))


def with_best(comparison: Comparison, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of the best method, which the verdicts are about."""
    return [pair for pair in pairs if comparison["recommendation"].get("best") in (pair.a, pair.b)]


def forest_scale(pairs: Iterable[Pair]) -> Scale:
    """One scale for all rows, with zero and the margins on it."""
    values = [0.0]
    for pair in pairs:
        values += [value for value in pair.per_seed.values() if is_number(value)]
        values += [*(pair.interval or ()), *([-pair.margin, pair.margin] if is_number(pair.margin) else [])]
        values += [pair.difference] if is_number(pair.difference) else []
    low, high = min(values), max(values)
    air = 0.05 * (high - low) or 1.0
    return Scale(low - air, high + air, 0, 100)


def forest_row(pair: Pair, scale: Scale) -> Markup:
    """The plot of one pair."""
    middle = ROW_HEIGHT / 2
    parts = [_margin(pair, scale), line(scale(0), 0, scale(0), ROW_HEIGHT, "zero")]
    for seed, value in pair.per_seed.items():
        if is_number(value):
            parts.append(dot(scale(value), middle + 9, 2.6, "seed", f"seed {seed}: {significant(value, 3)}"))
    if is_number(pair.difference):
        if pair.interval is not None:
            parts.append(line(scale(pair.interval[0]), middle - 2, scale(pair.interval[1]), middle - 2, "whisker"))
        parts.append(dot(scale(pair.difference), middle - 2, 4.6, "mean", pair.text))
    return plot(ROW_HEIGHT, f"{pair.text}, {pair.verdict}", *parts)


def forest_axis(scale: Scale) -> Markup:
    """The axis, with as many round values as have room for their labels on a narrow plot."""
    for count in (6, 5, 4, 3):
        ticks = nice_ticks(scale.low, scale.high, count)
        texts = [tick_label(tick, ticks).replace("-", "\u2212") for tick in ticks]
        if sum(LETTER * len(text) + LETTER for text in texts) < NARROW:
            break
    return strip_axis("scale of the differences", scale, ticks, texts)


def _margin(pair: Pair, scale: Scale) -> Markup:
    """The band of differences within the margin, which count as zero."""
    if not is_number(pair.margin):
        return Markup("")
    start, end = scale(-pair.margin), scale(pair.margin)
    return tag("rect", x=across(start), width=across(end - start), y=0, height=ROW_HEIGHT, class_="margin")


def _pair(item: Fields, higher: bool) -> Pair:
    given, verdict = item["difference"], str(item["verdict"])
    is_turned = is_number(given) and (given < 0 if higher else given > 0)
    sign = -1 if is_turned else 1
    bounds: Sequence[float] | None = item["interval"] if half_width(item["interval"]) is not None else None
    low_high = sorted(sign * bound for bound in bounds) if bounds else None
    return Pair(
        item["b"] if is_turned else item["a"],
        item["a"] if is_turned else item["b"],
        item["metric"],
        sign * given if is_number(given) else None,
        (low_high[0], low_high[1]) if low_high else None,
        item["margin"] if is_number(item["margin"]) else None,
        TURNED.get(verdict, verdict) if is_turned else verdict,
        _corrected(item["p_value"], item["comparisons"]),
        _corrected(item["equivalence_p"], item["comparisons"]),
        item["seed_sd"],
        int(item["pairs"] or 0),
        int(item["seeds"] or 0),
        {seed: sign * value for seed, value in item["per_seed"].items() if is_number(value)},
        bool(item["paired_by_example"]),
    )


def _corrected(p_value: Json, comparisons: int) -> float | None:
    return min(1.0, p_value * comparisons) if is_number(p_value) else None
