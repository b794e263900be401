"""The smallest difference that a comparison detects, from its finished runs or, without any, from assumptions; and the
cheapest comparison that would detect a difference that matters.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean

from rankwise.comparison.matrix import planned_runs
from rankwise.comparison.statistics import POWER, Estimate, minimum_detectable_effect, pooled, spread_parts
from rankwise.comparison.verdicts import Scores, estimate_difference
from rankwise.reports.schema import Method, MinimumDetectableEffect

# The largest comparison that is proposed: seeds, and factors of the evaluation rows.
MOST_SEEDS = 64
ROW_FACTORS = tuple(2**power for power in range(11))


class Spreads:
    """The spreads over seeds and rows from which detectable differences follow."""

    def __init__(
        self, scores: Mapping[str, Scores], *, metric: str, margin: float, rows: int, seed_sd: float, row_sd: float
    ) -> None:
        """``scores``: {method: its scores on ``metric``}. Where no two of them have an interval, the spreads are
        assumed: ``seed_sd`` and ``row_sd``, as shares of the metric.
        """
        self.metric, self.margin, self.rows = metric, margin, rows
        pairs = itertools.combinations(scores.values(), 2)
        common = [(a, b) for a, b in pairs if a.values.keys() & b.values.keys()]
        self.estimates = [found for a, b in common if (found := estimate_difference(a, b)[0]).parts]
        self.assumed = None if self.estimates else {"seed_sd": seed_sd, "row_sd": row_sd}
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
            "power": POWER,
            "assumed": self.assumed,
        }

    def deciding(self, seeds: int, methods: int, rates: int, *, short: bool, anew: bool) -> tuple[int, int, int] | None:
        """(further runs, factor of the rows, seeds) of the cheapest comparison of ``methods`` methods that detects a
        difference of the margin; None where even the largest does not.

        More seeds continue the comparison; more rows, and with ``anew`` all changes, need another one with its own
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
                runs = planned_runs(methods, rates, counts[place], short=short)
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
