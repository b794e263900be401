"""The smallest difference that a comparison detects, from its finished runs or, without any, from assumptions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from statistics import fmean

from rankwise.comparison.settings import CompareSettings
from rankwise.comparison.statistics import POWER, minimum_detectable_effect, pooled, spread_parts
from rankwise.comparison.verdicts import Scores, estimate_difference
from rankwise.reports.schema import EVAL_LOSS, MinimumDetectableEffect


def detectable_effect(
    given: CompareSettings, scores: Mapping[str, Scores], *, seeds: int, rows: int
) -> MinimumDetectableEffect:
    """The smallest difference that ``seeds`` seeds and ``rows`` evaluation rows detect.

    ``scores``: {method: its scores on the deciding metric}.
    """
    methods = len(given.methods)
    measured = measured_effect(scores, given.metric, methods=methods, margin=given.margin, seeds=seeds)
    if measured is not None:
        return measured
    # For preferences, the loss is only known as a mean.
    by_row = given.row_sd if (given.objective, given.metric) == ("sft", EVAL_LOSS) else 0.0
    parts = spread_parts(seed_sd=given.seed_sd, seeds=seeds, row_sd=by_row, rows=rows if by_row else 0)
    relative = minimum_detectable_effect(parts, methods=methods, margin=given.margin)
    of_rows = f"two methods' difference by {100 * by_row:g} % from row to row (--row-sd)"
    assumption = (
        f"runs that differ only in the seed vary by {100 * given.seed_sd:g} % of {given.metric} "
        f"(--seed-sd), and {of_rows if by_row else 'there are examples enough'}"
    )
    return _effect(given.metric, relative, None, seeds, methods, assumption)


def measured_effect(
    scores: Mapping[str, Scores], metric: str, *, methods: int, margin: float, seeds: int
) -> MinimumDetectableEffect | None:
    """The smallest difference by the spreads of finished runs; None where no pair of them has an interval."""
    pairs = [pair for pair in itertools.combinations(scores.values(), 2) if set(pair[0].values) & set(pair[1].values)]
    measured = pooled([estimate_difference(a, b)[0] for a, b in pairs], seeds)
    if not measured.parts:
        return None
    level = abs(fmean(value for item in scores.values() for value in item.values.values()))
    absolute = minimum_detectable_effect(
        measured.parts, methods=methods, margin=margin * level, skewness=measured.skewness
    )
    relative = absolute / level if absolute is not None and level else None
    return _effect(metric, relative, absolute, seeds, methods, "runs vary as the finished ones do")


def _effect(
    metric: str, relative: float | None, absolute: float | None, seeds: int, methods: int, assumption: str
) -> MinimumDetectableEffect:
    return {
        "metric": metric,
        "relative": relative,
        "absolute": absolute,
        "seeds": seeds,
        "comparisons": math.comb(methods, 2),
        "power": POWER,
        "assumption": assumption,
    }
