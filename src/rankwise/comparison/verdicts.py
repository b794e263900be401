"""From paired differences to verdicts, the smallest difference that is found, and one recommendation."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from statistics import fmean
from typing import Literal, get_args

from rankwise.comparison.stages import planned_runs
from rankwise.comparison.statistics import (
    ALPHA,
    Estimate,
    mean_of_seeds,
    minimum_detectable_effect,
    paired_by_example,
    pooled,
    spread_parts,
)
from rankwise.methods import method_of
from rankwise.reports.comparison import (
    TURNED,
    CostName,
    DecidingCost,
    Difference,
    Method,
    MethodVerdict,
    MinimumDetectableEffect,
    Recommendation,
    Retained,
    Retention,
    Verdict,
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """One method on one metric: a value for each seed, and the examples' own values where the metric is their mean.

    ``examples``: (S, n) in the metric's unit; ``weights``: (n,), so that the weighted mean over examples is the metric;
    ``clusters``: (n,) names of the groups (one source text, one question) that examples come from.
    """

    # {seed: value}.
    values: Mapping[int, float]
    # {seed: a value per example}; empty for a metric of the whole corpus, such as BLEU.
    examples: Mapping[int, Sequence[float]] = dataclasses.field(default_factory=dict)
    ids: Sequence[str] = ()
    weights: Sequence[float] | None = None
    clusters: Sequence[Hashable] | None = None


def estimate_difference(a: Scores, b: Scores) -> tuple[Estimate, bool, int]:
    """(estimate of ``a - b`` over common seeds, whether examples were paired, number of examples or seeds)."""
    seeds = _common(a, b)
    by_example = bool(a.ids) and list(a.ids) == list(b.ids) and set(seeds) <= set(a.examples) & set(b.examples)
    if by_example:
        left, right = ([scores.examples[seed] for seed in seeds] for scores in (a, b))
        return paired_by_example(left, right, weights=a.weights, clusters=a.clusters), True, len(a.ids)
    return mean_of_seeds([a.values[seed] - b.values[seed] for seed in seeds]), False, len(seeds)


def _common(a: Scores, b: Scores) -> list[int]:
    return sorted(set(a.values) & set(b.values))


def compare_all(
    metric: str,
    scores: Mapping[str, Scores],
    *,
    higher_is_better: bool,
    relative_margin: float,
    untuned: Collection[str] = (),
) -> list[Difference]:
    """Every pair of methods on one metric.

    The margin of equivalence is ``relative_margin`` times the mean of all methods. Verdicts are corrected for the
    comparisons with the best (Hsu 1984): of k tuned methods, only the k - 1 tests of the best one's own pairs can call
    it worse, so every p-value is multiplied by k - 1. The best one is called worse in at most 5 % of comparisons.
    """
    means = [mean_of_seeds(list(item.values.values())).mean for item in scores.values()]
    margin = relative_margin * abs(sum(means) / len(means)) if means else 0.0
    comparisons = max(1, len(scores.keys() - set(untuned)) - 1)
    found: list[Difference] = []
    for a, b in itertools.combinations(scores, 2):
        seeds = _common(scores[a], scores[b])
        if not seeds:
            continue
        estimate, by_example, count = estimate_difference(scores[a], scores[b])
        interval, p, equivalence_p = estimate.interval(), estimate.p_value(), estimate.equivalence_p(margin)
        said: Verdict = "cannot tell"
        if {a, b} & set(untuned):
            said = "not tuned"
        # A significant difference that is significantly below the margin does not matter.
        elif equivalence_p is not None and equivalence_p * comparisons < ALPHA:
            said = "equivalent"
        elif p is not None and p * comparisons < ALPHA:
            said = "better" if (estimate.mean > 0) == higher_is_better else "worse"
        found.append(
            {
                "a": a,
                "b": b,
                "metric": metric,
                "difference": estimate.mean,
                "interval": None if interval is None else list(interval),
                "standard_error": estimate.standard_error,
                "p_value": p,
                "equivalence_p": equivalence_p,
                "comparisons": comparisons,
                "margin": margin,
                "verdict": said,
                "seed_sd": estimate.seed_sd,
                "pairs": count,
                "clusters": estimate.clusters,
                "seeds": len(seeds),
                "per_seed": {str(seed): value for seed, value in zip(seeds, estimate.per_seed)},
                "paired_by_example": by_example,
            }
        )
    return found


def retentions(scores: Mapping[str, Scores], base: Scores, *, relative_margin: float) -> dict[str, Retention]:
    """What each method kept of the rows that must stay, by its loss minus that of the base, which was measured once.

    Kept: the loss surely rose by less than ``relative_margin`` of the base's. Lost: it surely rose, and not surely by
    less. Surely: with a one-sided p-value below 0.05 when multiplied by the number of methods.
    """
    (level,) = base.values.values()
    margin = relative_margin * level
    rows = next(iter(base.examples.values()), ())
    found: dict[str, Retention] = {}
    for name, own in scores.items():
        values, examples = dict.fromkeys(own.values, level), dict.fromkeys(own.values, rows)
        repeated = dataclasses.replace(base, values=values, examples=examples)
        estimate, by_example, _ = estimate_difference(own, repeated)
        interval = estimate.interval()
        kept_p, lost_p = (estimate.below_p(margin), estimate.above_p(0.0)) if estimate.parts else (None, None)
        said: Retained = "cannot tell"
        if kept_p is not None and kept_p * len(scores) < ALPHA:
            said = "kept"
        elif lost_p is not None and lost_p * len(scores) < ALPHA:
            said = "lost"
        found[name] = {
            "verdict": said,
            "base": level,
            "difference": estimate.mean,
            "interval": None if interval is None else list(interval),
            "kept_p": kept_p,
            "lost_p": lost_p,
            "comparisons": len(scores),
            "margin": margin,
            "paired_by_example": by_example,
        }
    return found


def _stays(method: Method) -> Literal["kept", "lost", "unknown"]:
    """Whether the method kept what must stay, or lost more of it than the margin."""
    found = method["retained"]
    if found is not None and found["verdict"] == "lost" and found["difference"] > found["margin"]:
        return "lost"
    return "kept" if found is not None and found["verdict"] == "kept" else "unknown"


# The largest comparison that is proposed: seeds, and factors of the evaluation rows.
MOST_SEEDS = 64
ROW_FACTORS = tuple(2**power for power in range(7))

# Shares of the metric that are assumed before there are runs: its standard deviation over seeds, and that of the
# difference of two methods over rows.
SEED_SD, ROW_SD = 0.005, 0.04


class Spreads:
    """The spreads over seeds and rows from which detectable differences follow."""

    def __init__(self, scores: Mapping[str, Scores], *, metric: str, margin: float, rows: int, is_by_row: bool) -> None:
        """``scores``: {method: its scores on ``metric``}. If no two of them have an interval, the spreads are
        assumed. ``is_by_row``: whether the metric is known of each of the ``rows``.
        """
        self.metric, self.margin, self.rows = metric, margin, rows
        pairs = itertools.combinations(scores.values(), 2)
        common = [(a, b) for a, b in pairs if a.values.keys() & b.values.keys()]
        self.estimates = [found for a, b in common if (found := estimate_difference(a, b)[0]).parts]
        self.assumed = None if self.estimates else {"seed_sd": SEED_SD, "row_sd": ROW_SD * is_by_row}
        values = [value for item in scores.values() for value in item.values.values()]
        self.level = abs(fmean(values)) if self.estimates else 1.0

    def smallest(self, seeds: int, comparisons: int, rows_factor: int = 1) -> float | None:
        """The smallest difference found, in the metric's unit or, where spreads are assumed, as a share of it."""
        spread = pooled(self.estimates, seeds, rows_factor)
        if self.assumed is not None:
            rows = self.rows * rows_factor if self.assumed["row_sd"] else 0
            spread = Estimate(0.0, spread_parts(seeds=seeds, rows=rows, **self.assumed))
        margin = self.margin * self.level
        return minimum_detectable_effect(spread.parts, comparisons=comparisons, margin=margin, skewness=spread.skewness)

    def effect(self, seeds: int, comparisons: int) -> MinimumDetectableEffect:
        found = self.smallest(seeds, comparisons)
        return {
            "metric": self.metric,
            "relative": found / self.level if found is not None and self.level else None,
            "absolute": None if self.assumed else found,
            "seeds": seeds,
            "comparisons": comparisons,
            "assumed": self.assumed,
        }

    def deciding(self, seeds: int, methods: int, rates: int, *, anew: bool) -> tuple[int, int, int] | None:
        """(further runs, factor of the rows, seeds) of the cheapest comparison of ``methods`` methods that detects a
        difference of the margin; None if even the largest does not.

        More seeds continue the comparison; more rows, and with ``anew`` all changes, need a new one with its own
        search over ``rates``.
        """

        def is_enough(count: int) -> bool:
            found = self.smallest(count, methods - 1, factor)
            return found is not None and found <= self.margin * self.level

        choices = []
        for factor in ROW_FACTORS if self._has_rows() else (1,):
            continues = factor == 1 and not anew
            counts = range(max(2, seeds) if continues else 3, MOST_SEEDS + 1)
            place = bisect.bisect_left(counts, True, key=is_enough)
            if place < len(counts):
                runs = planned_runs(methods, rates, counts[place])
                choices.append((methods * (counts[place] - seeds) if continues else runs, factor, counts[place]))
        return min(choices, default=None)

    def _has_rows(self) -> bool:
        if self.assumed is not None:
            return bool(self.assumed["row_sd"])
        return any(len(estimate.parts) > 1 for estimate in self.estimates)


def wider_rates(
    methods: Mapping[str, Method], names: Sequence[str], grids: Mapping[str, Sequence[float]]
) -> list[float]:
    """For each of ``names`` that is not tuned, the next rate beyond the edge at which its best one lies."""
    found: set[float] = set()
    for name in names:
        grid = sorted(grids[name])
        if methods[name]["learning_rate_at_edge"]:
            edge, next_to_it = (grid[0], grid[1]) if methods[name]["learning_rate"] == grid[0] else (grid[-1], grid[-2])
            found.add(float(f"{edge * edge / next_to_it:.2g}"))
    return sorted(found)


# Words of a variant that change a rate or a scale, and no computation.
SAME_COMPUTE = ("plus", "rslora")
# Peaks that are closer count as equal: a run's peak is that of its largest batch, which depends on the seed, and the
# plan is not more exact.
MEMORY_TOLERANCE = 0.05


def comparable_costs(methods: Mapping[str, Method]) -> dict[str, dict[CostName, list[float]]]:
    """{method: {cost: its [lowest, highest] over the seeds}}. A cost that cannot be compared is left out: time of one
    run, or of runs that others ran beside; memory or parameters that are not known.

    Methods that compute the same, such as LoRA and LoRA+, share a range: only noise parts their times.
    """
    alike: dict[str, list[str]] = {}
    for name in methods:
        alike.setdefault("+".join(word for word in name.split("+") if word not in SAME_COMPUTE), []).append(name)
    found: dict[str, dict[CostName, list[float]]] = {}
    for names in alike.values():
        costs = [_own_costs(name, methods[name]) for name in names]
        shared = {
            cost: [min(own[cost][0] for own in known), max(own[cost][1] for own in known)]
            for cost in get_args(CostName)
            if (known := [own for own in costs if cost in own])
        }
        found |= dict.fromkeys(names, shared)
    return found


def _own_costs(name: str, method: Method) -> dict[str, list[float]]:
    ranges, parameters, row = method["ranges"], method["trainable_parameters"], method_of(name)
    costs = {"servers": [float(not (row.trains_all or row.kind == "lora"))] * 2}
    if method["alone"] and method["seeds"] > 1 and "wall_seconds" in ranges:
        costs["wall_seconds"] = ranges["wall_seconds"]
    if "peak_memory_bytes" in ranges:
        low, high = ranges["peak_memory_bytes"]
        costs["peak_memory_bytes"] = [low / (1 + MEMORY_TOLERANCE), high]
    if parameters is not None:
        costs["trainable_parameters"] = [parameters, parameters]
    return costs


def recommend(
    methods: Mapping[str, Method],
    differences: Sequence[Difference],
    *,
    metric: str,
    higher_is_better: bool,
    margin: float,
    detectable: float | None,
) -> tuple[Recommendation, dict[str, MethodVerdict]]:
    """The recommendation, and the verdict on each method against the best one.

    The best one is chosen from the tuned methods: it has the best mean of those that no test found
    worse. (The best mean may be of a method that a test found worse: a test takes the seeds that both methods have.)
    The cheapest of the best one and its equals is taken. Methods that the runs cannot tell from the best one are its
    equals if the comparison could have seen a difference that matters: ``detectable`` is at most ``margin``, both
    shares of the metric. Otherwise nothing is decided. If a candidate kept what must stay, methods that lost more
    than the margin are no candidates.
    """
    sign = -1 if higher_is_better else 1
    means = {name: sign * item["mean"][metric] for name, item in methods.items() if metric in item["mean"]}
    # Baselines are measured for comparison; their adapters neither merge nor load elsewhere.
    usable = [name for name in means if not method_of(name).is_guest] or list(means)
    candidates = [name for name in usable if not methods[name]["learning_rate_at_edge"]] or usable
    kept = [name for name in candidates if _stays(methods[name]) == "kept"]
    forgot = [name for name in usable if kept and _stays(methods[name]) == "lost"]
    usable, candidates = ([name for name in names if name not in forgot] for names in (usable, candidates))
    pairs = [item for item in differences if item["metric"] == metric]
    inside = [item for item in pairs if {item["a"], item["b"]} <= set(candidates)]
    lost = {item["a"] for item in inside if item["verdict"] == "worse"}
    lost |= {item["b"] for item in inside if item["verdict"] == "better"}
    best = min(candidates, key=lambda name: (name in lost, means[name], name))
    comparisons = max((item["comparisons"] for item in pairs), default=1)
    verdicts = {name: _against(name, best, pairs, comparisons) for name in means}
    if methods[best]["learning_rate_at_edge"]:
        verdicts[best]["verdict"] = "not tuned"
    can_see = detectable is not None and detectable <= margin
    equals, unsure = [], []
    for name in sorted(set(usable) - {best}, key=lambda name: (means[name], name)):
        said, p_value = verdicts[name]["verdict"], verdicts[name]["p_value"]
        if said == "equivalent" or (said == "cannot tell" and can_see and p_value is not None):
            equals.append(name)
        elif said == "cannot tell" or (said == "not tuned" and (name in candidates or means[name] < means[best])):
            unsure.append(name)
    method, costs = cheapest([best, *equals], methods)
    found: Recommendation = {
        "method": method,
        "decided": not unsure,
        "best": best,
        "candidates": candidates,
        "equals": equals,
        "open": unsure,
        "kept": kept,
        "forgot": forgot,
        "costs": costs,
        "deciding": None,
        "metric": metric,
        "margin": margin,
        "config": None,
        "command": None,
        "run": None,
        "adapter": None,
    }
    return found, verdicts


def _against(name: str, best: str, pairs: Sequence[Difference], comparisons: int) -> MethodVerdict:
    said: MethodVerdict = {"verdict": "cannot tell", "p_value": None, "comparisons": comparisons}
    if name == best:
        return {**said, "verdict": "best"}
    for item in pairs:
        if {item["a"], item["b"]} == {name, best}:
            said["verdict"] = item["verdict"] if item["a"] == name else TURNED.get(item["verdict"], item["verdict"])
            said["p_value"] = None if item["p_value"] is None else min(1.0, item["p_value"] * comparisons)
    return said


def cheapest(names: Sequence[str], methods: Mapping[str, Method]) -> tuple[str, list[DecidingCost]]:
    """The method with the lowest cost, and the costs for which the others were dropped.

    A method is dropped if its lowest figure is above the highest figure of another method, so that timing noise decides
    nothing and the order of the checks does not matter. ``names`` are sorted, best first; the first one left is taken.
    """
    left = list(names)
    decided: list[DecidingCost] = []
    for cost in get_args(CostName):
        known = {name: methods[name]["costs"][cost] for name in left if cost in methods[name]["costs"]}
        if not known:
            continue
        least = min(known, key=lambda name: (known[name][1], left.index(name)))
        out = [name for name in known if known[name][0] > known[least][1]]
        if out:
            decided.append({"cost": cost, "methods": out, "than": least})
            left = [name for name in left if name not in out]
    if left[1:]:
        decided.append({"cost": "mean", "methods": left[1:], "than": left[0]})
    return left[0], decided
