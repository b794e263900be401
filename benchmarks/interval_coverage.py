"""How often 95 % intervals of a paired difference hold the truth: ours, and one with Satterthwaite's degrees.

    python benchmarks/interval_coverage.py

Differences d[s, i] = seed[s] + example[i] + rest[s, i] around 0, 300 examples, 2000 simulated comparisons a row.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from rankwise.comparison.statistics import Estimate, paired_by_example

EXAMPLES, TIMES = 300, 2000
SPREADS = ((0.0, 0.3, 0.1), (0.02, 0.3, 0.1), (0.07, 0.3, 0.1), (0.03, 0.3, 0.3), (0.14, 0.0, 0.1))
# Standard deviations of seeds, examples and the rest.


def satterthwaite(estimate: Estimate) -> float:
    """Half the width of the interval ``mean -+ t(df) * SE``."""
    variances, degrees = np.array(estimate.parts).T
    df = variances.sum() ** 2 / (variances**2 / degrees).sum()
    return float(stats.t.ppf(0.975, df) * np.sqrt(variances.sum()))


def main() -> None:
    print("seeds  sd of seeds  examples  rest    ours  Satterthwaite")
    draw = np.random.default_rng(0)
    for seeds in (2, 3, 5):
        for of_seeds, of_examples, of_rest in SPREADS:
            ours = theirs = 0
            for _ in range(TIMES):
                d = draw.normal(0, of_seeds, (seeds, 1)) + draw.normal(0, of_examples, (1, EXAMPLES))
                d = d + draw.normal(0, of_rest, (seeds, EXAMPLES))
                estimate = paired_by_example(d, np.zeros_like(d))
                low, high = estimate.interval()
                ours += low <= 0 <= high
                theirs += abs(estimate.mean) <= satterthwaite(estimate)
            shares = f"{ours / TIMES:.3f}  {theirs / TIMES:.3f}"
            print(f"{seeds:5}  {of_seeds:11}  {of_examples:8}  {of_rest:4}   {shares}")


if __name__ == "__main__":
    main()
