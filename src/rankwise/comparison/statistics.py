"""Intervals, paired differences and equivalence. Plain numbers in, plain numbers out; nothing here knows of runs.

Legend: S seeds, n examples, G clusters of examples; ``d[s, i]`` is the difference of two methods on example i under
seed s, ``w[i]`` the weight of the example (its tokens) with mean 1.

The model of a paired difference is crossed: ``d[s, i] = delta + seed[s] + example[i] + rest[s, i]``, since every seed
is evaluated on the same examples. Both the seeds and the examples are a sample, so both belong into the error of
``delta``: leaving one out is what makes single-seed and small-test-set conclusions flip.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]
CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8
ROUNDING = 1e-12
# Errors below this share of the values are rounding: two identical methods differ by nothing, for certain.
SMALLEST_LOG_P = -138.0  # p-values below 1e-60 are 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and what its error is made of; without ``parts`` one value cannot tell its spread.

    Its interval is ``mean -+ sqrt(sum over parts of t(p, degrees)^2 * variance)``: Student's t for one part, and for
    several the modified large-sample interval of Graybill and Wang (1980). Satterthwaite's degrees of freedom gave
    intervals that hold too seldom with few seeds (benchmarks/interval_coverage.py).
    """

    mean: float
    parts: tuple[tuple[float, float], ...] = ()
    # (variance of the mean, degrees of freedom) of each source of error.
    seed_sd: float | None = None
    # Spread from seed to seed; for a difference the part that the examples do not explain.
    example_se: float | None = None
    # Error that comes from the choice of examples alone.
    per_seed: tuple[float, ...] = ()
    clusters: int = 0

    @property
    def standard_error(self) -> float | None:
        return math.sqrt(sum(variance for variance, _ in self.parts)) if self.parts else None

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        if not self.parts:
            return None
        half = self._half(1 - confidence)
        return self.mean - half, self.mean + half

    def p_value(self) -> float | None:
        """Two-sided, of the hypothesis that the mean is 0: the level at which the interval just reaches 0."""
        return self._level(abs(self.mean)) if self.parts else None

    def equivalence_p(self, margin: float) -> float | None:
        """TOST (Schuirmann 1987): the larger p-value of ``mean <= -margin`` and ``mean >= margin``."""
        if not self.parts:
            return None
        nearest = margin - abs(self.mean)
        one_sided = self._level(abs(nearest)) / 2
        return one_sided if nearest > 0 else 1 - one_sided

    def _half(self, alpha: float) -> float:
        squares = [
            float(stats.t.isf(alpha / 2, degrees)) ** 2 * variance for variance, degrees in self.parts if variance
        ]
        return math.sqrt(sum(squares))

    def _level(self, distance: float) -> float:
        """``alpha`` with ``half(alpha) = distance``."""
        if self.standard_error == 0 or distance == 0:
            return 0.0 if distance > 0 else 1.0
        if self._half(math.exp(SMALLEST_LOG_P)) <= distance:
            return 0.0
        return math.exp(optimize.brentq(lambda log_p: self._half(math.exp(log_p)) - distance, SMALLEST_LOG_P, -1e-12))


def mean_of_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds; its error is ``sd / sqrt(S)`` with S - 1 degrees of freedom."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    per_seed = tuple(map(float, array))
    if len(array) < 2:
        return Estimate(mean, per_seed=per_seed)
    sd = _no_rounding(float(array.std(ddof=1)), array)
    return Estimate(mean, ((sd**2 / len(array), len(array) - 1.0),), seed_sd=sd, per_seed=per_seed)


def paired_by_example(a: Any, b: Any, *, weights: Any = None, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The difference ``a - b`` of two methods, (S, n) each, seeds and examples paired.

    ``delta = mean over s of sum_i w[i] d[s, i] / n``; with cluster sums of the centred differences
    ``u[s, g] = sum over i in g of w[i] (d[s, i] - delta[s])`` and dots for means over an index,

        V_example = G / (G - 1) * sum_g u[., g]^2 / n^2                       (clustered; Miller 2024, section 3)
        V_seed    = var_s(delta[s]) / S
        V_rest    = G / n^2 / S * sum_sg (u[s, g] - u[., g])^2 / ((S - 1) (G - 1))

    V_rest is in both of the others, so the parts of the error are V_seed (S - 1 degrees of freedom) and
    V_example - V_rest (G - 1). With one seed only ``example_se`` is known, and there is no interval.
    """
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    S, n = d.shape
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64) * n / np.sum(weights)
    delta = d @ w / n
    u = _cluster_sums(w * (d - delta[:, None]), clusters)
    G = u.shape[1]
    per_seed, mean = tuple(map(float, delta)), float(delta.mean())
    V_example = G / max(G - 1, 1) * float(np.sum(u.mean(0) ** 2)) / n**2
    example_se = _no_rounding(math.sqrt(V_example), d) if G > 1 else None
    if S < 2 or G < 2:
        return Estimate(mean, example_se=example_se, per_seed=per_seed, clusters=G)
    V_seed = _no_rounding(float(delta.std(ddof=1)), d) ** 2 / S
    V_rest = G / n**2 / S * float(np.sum((u - u.mean(0)) ** 2)) / ((S - 1) * (G - 1))
    parts = ((V_seed, S - 1.0), (_no_rounding(math.sqrt(max(0.0, V_example - V_rest)), d) ** 2, G - 1.0))
    seed_sd = math.sqrt(max(0.0, S * (V_seed - V_rest)))
    return Estimate(mean, parts, seed_sd, example_se, per_seed, G)


def _cluster_sums(values: Array, clusters: Sequence[Hashable] | None) -> Array:
    """(S, n) -> (S, G)."""
    if clusters is None:
        return values
    numbers = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[name] for name in clusters])
    return np.stack([np.bincount(index, weights=row, minlength=len(numbers)) for row in values])


def _no_rounding(error: float, values: Array) -> float:
    return 0.0 if error <= ROUNDING * float(np.max(np.abs(values), initial=0.0)) else error


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm (1979): the k-th smallest of m p-values times m - k + 1, made monotone, at most 1. None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[index] = largest
    return corrected


def minimum_detectable_effect(*, seed_sd: float, seeds: int, comparisons: int) -> float | None:
    """Smallest true difference found with power 0.8 by a paired test over seeds, in the unit of ``seed_sd``.

    ``(t(1 - alpha / 2m, S - 1) + t(power, S - 1)) * sqrt(2 / S) * seed_sd``, m comparisons (the first of Holm's
    thresholds), each method with the same spread over seeds. None with one seed.
    """
    if seeds < 2:
        return None
    critical = stats.t.ppf(1 - ALPHA / 2 / max(comparisons, 1), seeds - 1) + stats.t.ppf(POWER, seeds - 1)
    return float(critical * math.sqrt(2 / seeds) * seed_sd)
