"""What the plots of a comparison show: pairs of methods, quality against cost, loss curves, norms of the updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from rankwise.foreign import Fields, Json
from rankwise.reports.comparison import Comparison
from rankwise.reports.losses import Losses, Point
from rankwise.reports.numbers import difference, half_width, is_above, is_number

Range = tuple[float, float]
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


@dataclasses.dataclass(frozen=True)
class Spot:
    """The cost and quality of one method, and the ranges of both if they are known."""

    method: str
    cost: float
    quality: float
    cost_range: Range
    quality_range: Range | None
    # Costs count as equal where these ranges overlap; None if they cannot be compared.
    told_apart: Range | None = None


def spots_of(comparison: Comparison, cost: str, scale: float) -> list[Spot]:
    """The methods that have both figures. ``cost`` is a name of a cost, and is divided by ``scale``."""
    found = []
    for name in comparison.with_result():
        facts = comparison["methods"][name]
        if is_number(facts[cost]):
            shown = facts["ranges"].get(cost) or (facts[cost], facts[cost])
            found.append(_spot(comparison, name, scale, facts[cost], shown, facts["costs"].get(cost)))
    return found


def losses_of(comparison: Comparison) -> list[Spot]:
    """The methods with the rise of their loss on what must stay as cost, in percent of the base's loss."""
    found = []
    for name in comparison.with_result():
        if (kept := comparison["methods"][name].get("retained")) is not None:
            rise, interval = kept["difference"], kept["interval"]
            found.append(_spot(comparison, name, kept["base"] / 100, rise, interval or (rise, rise), interval))
    return found


def _spot(
    comparison: Comparison, name: str, scale: float, cost: float, shown: Sequence[float], apart: Sequence[float] | None
) -> Spot:
    facts, metric = comparison["methods"][name], comparison.metric
    interval = facts["interval"].get(metric)
    return Spot(
        name,
        cost / scale,
        facts["mean"][metric],
        (shown[0] / scale, shown[1] / scale),
        None if half_width(interval) is None else (interval[0], interval[1]),
        None if apart is None else (apart[0] / scale, apart[1] / scale),
    )


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


@dataclasses.dataclass(frozen=True)
class Curve:
    """The losses of one run. The training loss is drawn for final runs only, and is smoothed."""

    method: str
    is_final: bool
    losses: Losses

    @property
    def training(self) -> Sequence[Point]:
        return self.losses.smooth if self.is_final else []


def curves_of(comparison: Comparison) -> list[Curve]:
    """The curves of all runs that left metrics, failed ones included."""
    found = []
    for run in comparison["runs"]:
        lines = comparison.metrics_of(run) if run["folder"] else []
        losses = Losses.of(lines, (run["record"] or {}).get("kept_step"))
        if losses.training or losses.evaluation:
            found.append(Curve(run["method"], run["phase"] == "final", losses))
    return found
