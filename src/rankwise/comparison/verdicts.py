"""From paired differences to verdicts.

A pair is better (or worse), equivalent, or the runs cannot tell: a test that finds no difference does not prove that
there is none. A method whose best learning rate lies at the edge of the grid is not tuned, and gets no other verdict.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence

from rankwise.comparison.statistics import ALPHA, Estimate, mean_of_seeds, paired_by_example
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
                "example_se": estimate.example_se,
                "pairs": count,
                "clusters": estimate.clusters,
                "seeds": len(seeds),
                "per_seed": {str(seed): value for seed, value in zip(seeds, estimate.per_seed)},
                "paired_by_example": by_example,
            }
        )
    return found
