"""From paired differences to verdicts and tie groups.

There are three verdicts: better (or worse), equivalent, and cannot tell. A test that finds no difference does not prove
that there is none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Mapping, Sequence

from rankwise.comparison.statistics import ALPHA, Estimate, holm, mean_of_seeds, paired_by_example
from rankwise.foreign import Fields
from rankwise.reports.schema import Difference, Verdict


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


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two methods, and the estimate of ``a - b`` over the seeds that both have."""

    a: str
    b: str
    estimate: Estimate
    # Whether the estimate pairs examples.
    by_example: bool
    # Number of examples or, where there are none, of seeds.
    count: int
    seeds: Sequence[int]


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
    metric: str, scores: Mapping[str, Scores], *, higher_is_better: bool, relative_margin: float
) -> list[Difference]:
    """Every pair of methods on one metric.

    The margin of equivalence is ``relative_margin`` times the mean of all methods. Holm's correction over the pairs is
    applied to the tests of a difference, and separately to the tests of equivalence. So at most 5 % of comparisons call
    any equal pair better or worse, and at most 5 % call any pair beyond the margin equivalent.
    """
    means = [mean_of_seeds(list(item.values.values())).mean for item in scores.values()]
    margin = relative_margin * abs(sum(means) / len(means)) if means else 0.0
    pairs = [
        _Pair(a, b, *estimate_difference(scores[a], scores[b]), seeds)
        for a, b in itertools.combinations(scores, 2)
        if (seeds := _common(scores[a], scores[b]))
    ]
    different = holm([pair.estimate.p_value() for pair in pairs])
    equivalent = holm([pair.estimate.equivalence_p(margin) for pair in pairs])
    found = []
    for pair, p_holm, equivalence_holm in zip(pairs, different, equivalent):
        said = verdict(pair.estimate.mean, p_holm, equivalence_holm, higher_is_better=higher_is_better)
        found.append(_difference(metric, pair, margin, (p_holm, equivalence_holm), said))
    return found


def _difference(
    metric: str, pair: _Pair, margin: float, corrected: tuple[float | None, float | None], said: Verdict
) -> Difference:
    """``corrected``: the p-values of the tests of a difference and of equivalence."""
    estimate = pair.estimate
    interval = estimate.interval()
    return {
        "a": pair.a,
        "b": pair.b,
        "metric": metric,
        "difference": estimate.mean,
        "interval": None if interval is None else list(interval),
        "standard_error": estimate.standard_error,
        "p_value": estimate.p_value(),
        "p_value_holm": corrected[0],
        "equivalence_p": estimate.equivalence_p(margin),
        "equivalence_p_holm": corrected[1],
        "margin": margin,
        "verdict": said,
        "seed_sd": estimate.seed_sd,
        "example_se": estimate.example_se,
        "pairs": pair.count,
        "clusters": estimate.clusters,
        "seeds": len(pair.seeds),
        "per_seed": {str(seed): value for seed, value in zip(pair.seeds, estimate.per_seed)},
        "paired_by_example": pair.by_example,
    }


def verdict(
    difference: float, p_holm: float | None, equivalence_holm: float | None, *, higher_is_better: bool
) -> Verdict:
    """The verdict on ``a - b``, from the point of view of ``a``, by p-values that are corrected over the pairs.

    Equivalence comes first, since a significant difference that is significantly below the margin does not matter.
    """
    if equivalence_holm is not None and equivalence_holm < ALPHA:
        return "equivalent"
    if p_holm is not None and p_holm < ALPHA:
        return "better" if (difference > 0) == higher_is_better else "worse"
    return "cannot tell"


def tie_groups(order: Sequence[str], differences: Sequence[Fields]) -> dict[str, str]:
    """{method: its letters}, for methods in ``order``, best first. Methods that share a letter were not told apart.

    Insert and absorb (Piepho 2004): start with one group of all methods, split it by every pair that differs, and drop
    groups within others. Where nothing could be tested, with one seed, no method has a letter.
    """
    if differences and all(item["p_value"] is None for item in differences):
        return {}
    groups = [frozenset(order)]
    for item in differences:
        if item["verdict"] in ("better", "worse"):
            groups = _split(groups, item["a"], item["b"])
    groups.sort(key=lambda group: [order.index(name) for name in sorted(group, key=order.index)])
    return {
        name: "".join(chr(ord("a") + index) for index, group in enumerate(groups) if name in group) for name in order
    }


def _split(groups: Sequence[frozenset[str]], a: str, b: str) -> list[frozenset[str]]:
    parts = [part for group in groups for part in ((group - {a}, group - {b}) if {a, b} <= group else (group,))]
    return [part for part in dict.fromkeys(parts) if not any(part < other for other in parts)]
