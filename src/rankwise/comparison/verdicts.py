"""From paired differences to verdicts, the smallest difference that is found, and one recommendation."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from statistics import fmean
from typing import Literal, get_args

from rankwise.comparison.stages import beyond, planned_runs
from rankwise.comparison.statistics import (
    ALPHA,
    LOOKS,
    Estimate,
    last_look,
    mean_of_seeds,
    minimum_detectable_effect,
    paired_by_example,
    pooled,
    share_of,
)
from rankwise.methods import method_of
from rankwise.reports.comparison import (
    TURNED,
    Conclusions,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    # With --time, the methods that each call added: verdicts are spoken at looks, which share one error.
    looks: Sequence[Sequence[str]] = ()

    def first(self, seeds: int) -> Scores:
        """Those of the first seeds only."""
        chosen = sorted(self.values)[:seeds]
        values = {seed: self.values[seed] for seed in chosen}
        examples = {seed: self.examples[seed] for seed in chosen if seed in self.examples}
        return dataclasses.replace(self, values=values, examples=examples)


def estimate_difference(a: Scores, b: Scores) -> tuple[Estimate, bool, int]:
    """(estimate of ``a - b`` over common seeds, whether examples were paired, number of examples or seeds)."""
    seeds = _common(a, b)
    share = share_of(last_look(len(seeds))) if a.looks else 1.0
    by_example = bool(a.ids) and list(a.ids) == list(b.ids) and set(seeds) <= set(a.examples) & set(b.examples)
    if by_example:
        left, right = ([scores.examples[seed] for seed in seeds] for scores in (a, b))
        found = paired_by_example(left, right, weights=a.weights, clusters=a.clusters)
        return dataclasses.replace(found, share=share), True, len(a.ids)
    found = mean_of_seeds([a.values[seed] - b.values[seed] for seed in seeds])
    return dataclasses.replace(found, share=share), False, len(seeds)


def _common(a: Scores, b: Scores) -> list[int]:
    """The common seeds; of a comparison that looks, those of the last look."""
    seeds = sorted(set(a.values) & set(b.values))
    return seeds[: LOOKS[last_look(len(seeds)) - 1]] if a.looks and len(seeds) >= LOOKS[0] else seeds


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
    Those that look have the correction below, and before the first look no p-values.
    """
    means = [mean_of_seeds(list(item.values.values())).mean for item in scores.values()]
    margin = relative_margin * abs(sum(means) / len(means)) if means else 0.0
    found: list[Difference] = []
    for a, b in itertools.combinations(scores, 2):
        seeds = _common(scores[a], scores[b])
        if not seeds:
            continue
        estimate, by_example, count = estimate_difference(scores[a], scores[b])
        interval, p, equivalence_p = estimate.interval(), estimate.p_value(), estimate.equivalence_p(margin)
        comparisons: float = max(1, len(scores.keys() - set(untuned)) - 1)
        if looks := scores[a].looks:
            comparisons = correction(looks, a, b)
            if len(seeds) < LOOKS[0]:
                p = equivalence_p = None
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


# The share of the error that the methods of the first call spend; each further call spends half of what is left.
FIRST = 0.8


def correction(looks: Sequence[Sequence[str]], *names: str) -> float:
    """The factor of the p-values of a pair of methods, or of one against the base, in a comparison that looks.

    The best mean may be another method's at each look, so all pairs count and not those of one best method. Pairs with
    a method that a later call added are counted by themselves, and share what earlier calls left of the error.
    """
    call = max(number for number, added in enumerate(looks) if {*added} & {*names})
    before, added = sum(map(len, looks[:call])), len(looks[call])
    tests = math.comb(before + added, len(names)) - math.comb(before, len(names))
    return tests / ((1 - FIRST) / 2**call if call else FIRST)


def retentions(scores: Mapping[str, Scores], base: Scores, *, relative_margin: float) -> dict[str, Retention]:
    """What each method kept of the retained rows, by its loss minus that of the base, which was measured once.

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
        interval, comparisons = estimate.interval(), correction(own.looks, name) if own.looks else len(scores)
        is_early = bool(own.looks) and len(own.values) < LOOKS[0]
        is_tested = bool(estimate.parts) and not is_early
        kept_p, lost_p = (estimate.below_p(margin), estimate.above_p(0.0)) if is_tested else (None, None)
        said: Retained = "cannot tell"
        if kept_p is not None and kept_p * comparisons < ALPHA:
            said = "kept"
        elif lost_p is not None and lost_p * comparisons < ALPHA:
            said = "lost"
        found[name] = {
            "verdict": said,
            "base": level,
            "difference": estimate.mean,
            "interval": None if interval is None else list(interval),
            "kept_p": kept_p,
            "lost_p": lost_p,
            "comparisons": comparisons,
            "margin": margin,
            "paired_by_example": by_example,
        }
    return found


def _stays(method: Method) -> Literal["kept", "lost", "unknown"]:
    """Whether the method kept its level on the retained rows, or lost more than the margin."""
    found = method["retained"]
    if found is not None and found["verdict"] == "lost" and found["difference"] > found["margin"]:
        return "lost"
    return "kept" if found is not None and found["verdict"] == "kept" else "unknown"


# The largest comparison that is proposed: seeds, and factors of the evaluation rows.
MOST_SEEDS = 64
ROW_FACTORS = tuple(2**power for power in range(7))


class Spreads:
    """The spreads over seeds and rows from which detectable differences follow."""

    def __init__(self, scores: Mapping[str, Scores], *, metric: str, margin: float) -> None:
        """``scores``: {method: its scores on ``metric``}."""
        self.metric, self.margin = metric, margin
        pairs = itertools.combinations(scores.values(), 2)
        common = [(a, b) for a, b in pairs if a.values.keys() & b.values.keys()]
        self.estimates = [found for a, b in common if (found := estimate_difference(a, b)[0]).parts]
        self.looks = next((item.looks for item in scores.values()), ())
        values = [value for item in scores.values() for value in item.values.values()]
        self.level = abs(fmean(values)) if values else 0.0

    def smallest(self, seeds: int, comparisons: float, rows_factor: int = 1) -> float | None:
        """The smallest difference found, in the metric's unit; None before two methods have two common seeds."""
        spread = pooled(self.estimates, seeds, rows_factor)
        return minimum_detectable_effect(
            spread.parts,
            comparisons=comparisons,
            margin=self.margin * self.level,
            skewness=spread.skewness,
            share=share_of(last_look(seeds)) if self.looks else 1.0,
        )

    def of_rows(self, seeds: int) -> bool:
        """Whether the spread over rows is the larger part of the error, so that more rows help more than seeds."""
        by_seed, *by_row = [variance for variance, _ in pooled(self.estimates, seeds).parts or [(0.0, 0.0)]]
        return sum(by_row) > by_seed

    def effect(self, seeds: int, comparisons: float) -> MinimumDetectableEffect:
        found = self.smallest(seeds, comparisons)
        return {
            "metric": self.metric,
            "relative": found / self.level if found is not None and self.level else None,
            "absolute": found,
            "seeds": seeds,
            "comparisons": comparisons,
        }

    def deciding(self, seeds: int, methods: int, rates: int, *, anew: bool) -> tuple[int, int, int] | None:
        """(further runs, factor of the rows, seeds) of the cheapest comparison of ``methods`` methods that detects a
        difference of the margin; None if even the largest does not.

        More seeds continue the comparison; more rows, and with ``anew`` all changes, need a new one with its own
        search over ``rates``.
        """

        def is_enough(count: int) -> bool:
            found = self.smallest(count, methods - 1, factor)
            # Spreads that nothing is known of take three seeds.
            return count >= LOOKS[0] > seeds if found is None else found <= self.margin * self.level

        choices = []
        has_rows = any(len(estimate.parts) > 1 for estimate in self.estimates)
        for factor in ROW_FACTORS if has_rows else (1,):
            continues = factor == 1 and not anew
            counts = range(max(2, seeds) if continues else 3, MOST_SEEDS + 1)
            place = bisect.bisect_left(counts, True, key=is_enough)
            if place < len(counts):
                runs = planned_runs(methods, rates, counts[place])
                choices.append((methods * (counts[place] - seeds) if continues else runs, factor, counts[place]))
        return min(choices, default=None)


def next_seeds(
    found: Conclusions, scores: Mapping[str, Scores], spreads: Spreads, seeds: Mapping[str, int]
) -> dict[str, int]:
    """{method: its seeds at the next look} of the methods that may still be best; empty if it is decided, or if no
    number of seeds would decide it. ``seeds``: of each method so far; those with more wait for those with fewer.
    """
    told, methods = found["recommendation"], found["methods"]
    verdicts = {name: item["verdict"] and item["verdict"]["verdict"] for name, item in methods.items()}
    best, others = told["best"], [name for name in told["open"] if verdicts[name] == "cannot tell"]
    seen = spreads.smallest(LOOKS[-1], found["minimum_detectable_effect"]["comparisons"])
    margin = spreads.margin * spreads.level
    pairs = [
        item for item in found["differences"] if item["metric"] == spreads.metric and best in (item["a"], item["b"])
    ]
    may = (seen is not None and seen <= margin) or any(
        _seeds_may_tell(scores[item["a"]], scores[item["b"]], margin, item["comparisons"])
        for item in pairs
        if {item["a"], item["b"]} <= {best, *others}
    )
    if not (others and may):
        return {}
    fewest = min(seeds[name] for name in (best, *others))
    following = next((look for look in LOOKS if look > fewest), fewest)
    return {name: following for name in (best, *others) if seeds[name] == fewest < following}


def _seeds_may_tell(a: Scores, b: Scores, margin: float, comparisons: float) -> bool:
    """Whether the pair would be told apart, or equivalent, without the spread over seeds, at a mean within two standard
    errors of it: what remains is the spread over rows, which no seed reduces.
    """
    found, _, _ = estimate_difference(a, b)
    if len(found.parts) < 2:
        return True
    (variance, degrees), rows = found.parts
    reach, sign = 2 * math.sqrt(variance), math.copysign(1, found.mean)
    apart, near = (
        dataclasses.replace(found, mean=sign * mean, parts=((0.0, degrees), rows), share=1.0)
        for mean in (abs(found.mean) + reach, max(0.0, abs(found.mean) - reach))
    )
    told = apart.p_value(), near.equivalence_p(margin)
    return any(p is not None and p * comparisons < ALPHA for p in told)


def wider_rates(
    methods: Mapping[str, Method], names: Sequence[str], grids: Mapping[str, Sequence[float]]
) -> list[float]:
    """For each of ``names`` that is not tuned, the next rate beyond the edge at which its best one lies."""
    edges = [name for name in names if methods[name]["learning_rate_at_edge"]]
    return sorted({beyond(grids[name], rate) for name in edges if (rate := methods[name]["learning_rate"])})


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
    shares of the metric. Otherwise nothing is decided. If a candidate kept its level on the retained rows, methods
    that lost more than the margin are no candidates.
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
    comparisons = max((item["comparisons"] for item in pairs), default=1.0)
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
    # What to take meanwhile costs the least of those within the margin, or a standard error, of the best one.
    near = [name for name in unsure if name in candidates and _is_near(name, best, pairs)]
    method, costs = cheapest([best, *equals, *near], methods)
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


def _against(name: str, best: str, pairs: Sequence[Difference], comparisons: float) -> MethodVerdict:
    said: MethodVerdict = {"verdict": "cannot tell", "p_value": None, "comparisons": comparisons}
    if name == best:
        return {**said, "verdict": "best"}
    for item in pairs:
        if {item["a"], item["b"]} == {name, best}:
            said["verdict"] = item["verdict"] if item["a"] == name else TURNED.get(item["verdict"], item["verdict"])
            said["comparisons"] = item["comparisons"]
            said["p_value"] = None if item["p_value"] is None else min(1.0, item["p_value"] * item["comparisons"])
    return said


def _is_near(name: str, best: str, pairs: Sequence[Difference]) -> bool:
    """Whether their difference is known, and within the margin or a standard error."""
    own = [item for item in pairs if {item["a"], item["b"]} == {name, best}]
    return any(abs(item["difference"]) <= max(item["margin"], item["standard_error"] or 0.0) for item in own)


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
