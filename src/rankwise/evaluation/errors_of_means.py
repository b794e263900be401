"""Standard errors of means, with and without clusters of questions that share a source text.

Miller, "Adding Error Bars to Evals", arXiv 2411.00640. A score is a weighted mean ``m = sum w_i s_i / sum w_i``
(w = 1 for accuracy, w = tokens for a loss). With ``r_i = w_i (s_i - m)`` and clusters c,

    SE(m)^2  =  G / (G - 1)  *  sum_c (sum_{i in c} r_i)^2  /  (sum w)^2

which for w = 1 and clusters of one question is the usual sd / sqrt(n). The 95 % interval is the mean plus and minus
t SE, with t the 97.5 % quantile of Student's distribution with G - 1 degrees of freedom. A paired difference is the
mean of ``s_i(a) - s_i(b)`` on the same questions, with the same formula.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import special


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean, its standard error (None with fewer than two clusters), and the number of its independent clusters."""

    value: float
    standard_error: float | None
    clusters: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval."""
        if self.standard_error is None or self.clusters < 2:
            return None
        reach = float(special.stdtrit(self.clusters - 1, 0.975)) * self.standard_error
        return self.value - reach, self.value + reach


def mean_of(
    scores: Sequence[float], clusters: Sequence[Hashable] | None = None, weights: Sequence[float] | None = None
) -> Mean:
    """The weighted mean of (n,) scores with its clustered standard error; NaN for no score."""
    s = np.asarray(scores, dtype=np.float64)
    w = np.ones_like(s) if weights is None else np.asarray(weights, dtype=np.float64)
    total = float(w.sum())
    if total == 0:
        return Mean(math.nan, None, 0)
    value = float((w * s).sum() / total)
    residuals = w * (s - value)
    index = (
        np.arange(len(s)) if clusters is None else np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]
    )
    sums = np.bincount(index, weights=residuals)
    groups = len(sums)
    if groups < 2:
        return Mean(value, None, groups)
    variance = groups / (groups - 1) * float((sums**2).sum()) / total**2
    return Mean(value, math.sqrt(variance), groups)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
) -> Mean:
    """Mean of ``a - b`` over the same questions in the same order."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return mean_of(difference.tolist(), clusters, weights)


def clusters_of(names: Sequence[str | None]) -> list[str] | None:
    """Cluster names for ``mean_of``; None if every question is a cluster of its own."""
    if all(name is None for name in names):
        return None
    return [f"question {index}" if name is None else f"cluster {name}" for index, name in enumerate(names)]
