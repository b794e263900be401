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
    pairs = [pair for pair in itertools.combinations(scores.values(), 2) if set(pair[0].values) & set(pair[1].values)]
    measured = pooled([estimate_difference(a, b)[0] for a, b in pairs], seeds)
    if measured.parts:
        level = abs(fmean(value for item in scores.values() for value in item.values.values()))
        absolute = minimum_detectable_effect(
            measured.parts, methods=len(given.methods), margin=given.margin * level, skewness=measured.skewness
        )
        relative = absolute / level if absolute is not None and level else None
        assumption = "runs vary as the finished ones do"
    else:
        # For preferences, the loss is only known as a mean.
        by_row = given.row_sd if (given.objective, given.metric) == ("sft", EVAL_LOSS) else 0.0
        parts = spread_parts(seed_sd=given.seed_sd, seeds=seeds, row_sd=by_row, rows=rows if by_row else 0)
        relative, absolute = minimum_detectable_effect(parts, methods=len(given.methods), margin=given.margin), None
        of_rows = f"two methods' difference by {100 * by_row:g} % from row to row (--row-sd)"
        assumption = (
            f"runs that differ only in the seed vary by {100 * given.seed_sd:g} % of {given.metric} "
            f"(--seed-sd), and {of_rows if by_row else 'there are examples enough'}"
        )
    return {
        "metric": given.metric,
        "relative": relative,
        "absolute": absolute,
        "seeds": seeds,
        "comparisons": math.comb(len(given.methods), 2),
        "power": POWER,
        "assumption": assumption,
    }
