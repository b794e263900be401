"""Intervals, paired differences and equivalence. Input and output are plain numbers, independent of runs.

Legend: S seeds, n examples, G clusters of examples; ``d[s, i]`` is the difference of two methods on example i under
seed s, ``w[i]`` the weight of the example (its tokens) with mean 1, ``h[g]`` the share of the weight in cluster g.

The model of a paired difference is crossed: ``d[s, i] = delta + seed[s] + example[i] + rest[s, i]``, since every seed
is evaluated on the same examples. Both the seeds and the examples are samples, so both contribute to the error of
``delta``. Without one of them, conclusions would not replicate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from rankwise.errors import RunError

Array = NDArray[np.float64]
CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8
# Standard errors below this share of the values are rounding errors and count as 0 (two identical methods).
ROUNDING = 1e-12
# Natural logarithm of the smallest p-value, 1e-60; smaller ones count as 0.
SMALLEST_LOG_P = -138.0
# A sample's skewness is multiplied by this factor, since it underestimates that of the population, whose tail few
# samples hold. With less, intervals of 20 lognormal clusters undercover (benchmarks/interval_coverage.py).
SKEWNESS_FACTOR = 1.5
SIMULATED = 20_000
# The numbers of seeds after which a comparison with --time looks at its verdicts: about half as many again each time.
LOOKS = (3, 4, 6, 9, 14, 21, 32, 48, 64)


def last_look(seeds: int) -> int:
    """The number of the last look, from 1, that ``seeds`` common seeds admit; 0 before the first."""
    return sum(seeds >= look for look in LOOKS)


def share_of(look: int) -> float:
    """The share of alpha that look ``k`` may spend, ``6 / (pi^2 k^2)``: all looks that ever follow spend at most 1."""
    return 6 / (math.pi * max(1, look)) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and the parts of its error. Without ``parts`` (one value) the spread is unknown.

    Its limits are ``mean -+ sqrt(sum over parts of reach(p, degrees)^2 * variance)``. The reach is Student's quantile
    t; the sum is the modified large-sample interval of Graybill and Wang (1980), and with different reaches to the two
    sides that of Zou and Donner (2008). Intervals with Satterthwaite's degrees of freedom undercover with few seeds.

    At a look, the seeds' reach has the level ``share * p``. That of the rows keeps ``p``: their error is the same one
    at every look.

    For values skewed to the right, the sample mean is too low more often, and by more, than it is too high. The upper
    limit is then further away, by the cubic transformation of Hall (1992), with ``c`` the skewness of the mean:

        reach = max(t, 3 / c * (1 - cbrt(1 - c * (t + c / 6))))

    and the lower limit is Student's. For values skewed to the left the sides are exchanged.
    """

    mean: float
    # (variance of the mean, degrees of freedom) of each source of error.
    parts: tuple[tuple[float, float], ...] = ()
    # Skewness of the mean, from the last part.
    skewness: float = 0.0
    # Standard deviation over seeds; for a difference, the part that the examples do not explain.
    seed_sd: float | None = None
    # Standard error from the choice of examples only.
    example_se: float | None = None
    per_seed: tuple[float, ...] = ()
    clusters: int = 0
    # Share of the level that the spread over seeds, the first part, may use at this look.
    share: float = 1.0

    @property
    def standard_error(self) -> float | None:
        return math.sqrt(sum(variance for variance, _ in self.parts)) if self.parts else None

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        if not self.parts:
            return None
        return self.mean - self._half(1 - confidence, -1), self.mean + self._half(1 - confidence, 1)

    def p_value(self) -> float | None:
        """The two-sided p-value of "the mean is 0": the level at which the interval just reaches 0."""
        return self._level(abs(self.mean), -1 if self.mean > 0 else 1) if self.parts else None

    def equivalence_p(self, margin: float) -> float | None:
        """TOST (Schuirmann 1987): the larger of the p-values of ``mean <= -margin`` and ``mean >= margin``."""
        if not self.parts:
            return None
        return max(self.above_p(-margin), self.below_p(margin))

    def above_p(self, bound: float) -> float:
        """The one-sided p-value of "the true value is at most ``bound``"; needs ``parts``."""
        return self._beyond(self.mean - bound, -1)

    def below_p(self, bound: float) -> float:
        """The one-sided p-value of "the true value is at least ``bound``"; needs ``parts``."""
        return self._beyond(bound - self.mean, 1)

    def _beyond(self, gap: float, side: int) -> float:
        """The one-sided p-value of "the true value is more than ``gap`` away on this side of the mean"."""
        one_sided = self._level(abs(gap), side if gap > 0 else -side) / 2
        return one_sided if gap > 0 else 1 - one_sided

    def _half(self, alpha: float, side: int) -> float:
        """The distance from the mean to the upper limit (side 1) or the lower one (side -1)."""
        levels = [self.share * alpha, *(alpha for _ in self.parts[1:])]
        quantiles = [-float(special.stdtrit(part[1], level / 2)) for part, level in zip(self.parts, levels)]
        reaches = [*quantiles[:-1], _reach(quantiles[-1], side * self.skewness)]
        squares = (reach**2 * variance for reach, (variance, _) in zip(reaches, self.parts) if variance)
        return math.sqrt(sum(squares))

    def _level(self, distance: float, side: int) -> float:
        """The ``alpha`` for which ``half(alpha, side) = distance``."""
        if self.standard_error == 0 or distance == 0:
            return 0.0 if distance > 0 else 1.0

        def excess(log_p: float) -> float:
            return self._half(math.exp(log_p), side) - distance

        if excess(SMALLEST_LOG_P) <= 0:
            return 0.0
        return 1.0 if excess(0.0) >= 0 else math.exp(optimize.brentq(excess, SMALLEST_LOG_P, 0.0))


def _reach(t: float, skewness: float) -> float:
    if skewness <= 0:
        return t
    return max(t, float(3 / skewness * (1 - np.cbrt(1 - skewness * (t + skewness / 6)))))


def mean_of_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds; its error is ``sd / sqrt(S)`` with S - 1 degrees of freedom.

    Raises RunError RW589: values that are not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    _check_finite(array)
    mean = float(array.mean())
    per_seed = tuple(map(float, array))
    if len(array) < 2:
        return Estimate(mean=mean, per_seed=per_seed)
    sd = _no_rounding(float(array.std(ddof=1)), array)
    return Estimate(mean=mean, parts=((sd**2 / len(array), len(array) - 1.0),), seed_sd=sd, per_seed=per_seed)


def paired_by_example(
    a: ArrayLike, b: ArrayLike, *, weights: ArrayLike | None = None, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """The difference ``a - b`` of two methods, (S, n) each, seeds and examples paired.

    ``delta = mean over s of sum_i w[i] d[s, i] / n``. With cluster sums of the centred differences
    ``u[s, g] = sum over i in g of w[i] (d[s, i] - delta[s]) / n``, what leaving out cluster g changes,
    ``v[s, g] = u[s, g] / (1 - h[g])``, and dots for means over an index,

        V_example = (G - 1) / G * sum_g v[., g]^2           (jackknife, CV3: MacKinnon, Nielsen and Webb 2023)
        V_seed    = var_s(delta[s]) / S
        V_rest    = (G - 1) / G / S * sum_sg (v[s, g] - v[., g])^2 / (S - 1)
        skewness  = 1.5 * sum_g v[., g]^3 / (sum_g v[., g]^2)^(3/2)

    Of answers that are right or wrong, V_example is 1 / (G + 2)^2 larger, as if one more differed (Agresti and Min
    2005): that none of a few differ does not show that none would.

    V_rest is in both of the others, so the parts of the error are V_seed (S - 1 degrees of freedom) and
    V_example - V_rest. The latter has ``1 / sum_g h[g]^2 - 1`` degrees, G - 1 for even clusters: the effective number
    of clusters (Carter, Schnepel and Steigerwald 2017) less one, within 0.3 of the degrees of Bell and McCaffrey (2002)
    for 20 clusters of Zipf sizes. With one seed only ``example_se`` is known, and there is no interval.

    Raises RunError RW589: values that are not finite.
    """
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    S, n = d.shape
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        w = w * n / w.sum()
    _check_finite(d, w)
    delta = d @ w / n
    sums = _cluster_sums(np.vstack([w * (d - delta[:, None]), w]) / n, clusters)
    # Clusters without weight do not contribute.
    sums = sums[:, sums[-1] > 0]
    u, h = sums[:-1], sums[-1]
    G = len(h)
    per_seed, mean = tuple(map(float, delta)), float(delta.mean())
    if G < 2:
        return Estimate(mean=mean, per_seed=per_seed, clusters=G)
    v = u / (1 - h)
    V_example = (G - 1) / G * float(np.sum(v.mean(0) ** 2))
    example_se = _no_rounding(math.sqrt(V_example), d)
    if S < 2:
        return Estimate(mean=mean, example_se=example_se, per_seed=per_seed, clusters=G)
    V_seed = _no_rounding(float(delta.std(ddof=1)), d) ** 2 / S
    V_rest = (G - 1) / G / S * float(np.sum((v - v.mean(0)) ** 2)) / (S - 1)
    V_rows = _no_rounding(math.sqrt(max(0.0, V_example - V_rest)), d) ** 2
    if np.isin(np.stack([a, b]), (0, 1)).all():
        V_rows += 1 / (G + 2) ** 2
    parts = ((V_seed, S - 1.0), (V_rows, max(1.0, 1 / float(np.sum(h**2)) - 1)))
    third = float(np.sum(v.mean(0) ** 3) / np.sum(v.mean(0) ** 2) ** 1.5) if example_se else 0.0
    seed_sd = math.sqrt(max(0.0, S * (V_seed - V_rest)))
    return Estimate(
        mean=mean,
        parts=parts,
        skewness=SKEWNESS_FACTOR * third,
        seed_sd=seed_sd,
        example_se=example_se,
        per_seed=per_seed,
        clusters=G,
    )


def _check_finite(*arrays: Array) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise RunError(
            "RW589", "a value to compare is not a finite number; leave out the run or the example that it comes from."
        )


def _cluster_sums(values: Array, clusters: Sequence[Hashable] | None) -> Array:
    """Sums of ``values`` (S, n) over the examples of each cluster: (S, G)."""
    if clusters is None:
        return values
    numbers = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[name] for name in clusters])
    return np.stack([np.bincount(index, weights=row, minlength=len(numbers)) for row in values])


def _no_rounding(error: float, values: Array) -> float:
    return 0.0 if error <= ROUNDING * float(np.max(np.abs(values), initial=0.0)) else error


def minimum_detectable_effect(
    parts: Sequence[tuple[float, float]],
    *,
    comparisons: float,
    margin: float = 0.0,
    skewness: float = 0.0,
    share: float = 1.0,
) -> float | None:
    """The smallest true difference that is called better or worse with 80 % power; None without ``parts``.

    ``parts``, ``skewness`` and ``share`` are those of Estimate, taken as the true values; both signs are equally
    likely. A difference ``x`` is called better if it is above ``half(alpha / m)`` and not equivalent, that is, above
    ``margin - half(2 alpha / m)``, with m = ``comparisons``. With x = effect + sqrt(V) z, the result is the 80 %
    quantile of (the higher bound - sqrt(V) z) over 20,000 draws (seed 0) of z and of the variances that a comparison
    would estimate.
    """
    if not parts:
        return None
    draw = np.random.default_rng(0)
    V, degrees = np.array(parts, dtype=np.float64).T
    z = draw.standard_normal(SIMULATED)
    m = max(1.0, comparisons)
    estimated = V * draw.chisquare(degrees, (SIMULATED, len(V))) / degrees
    shares = np.where(np.arange(len(V)) == 0, share, 1.0)
    t_different, t_equivalent = (-special.stdtrit(degrees, shares * level / m) for level in (ALPHA / 2, ALPHA))
    to_the_tail = np.append(t_different[:-1], _reach(t_different[-1], skewness))
    not_equivalent = margin - np.sqrt(estimated @ t_equivalent**2)
    needed = [np.maximum(np.sqrt(estimated @ t**2), not_equivalent) for t in (t_different, to_the_tail)]
    return float(np.quantile(np.array(needed) - math.sqrt(V.sum()) * z, POWER))


def pooled(estimates: Sequence[Estimate], seeds: int, rows_factor: int = 1) -> Estimate:
    """One estimate around 0 with the mean parts and skewness of ``estimates``, for a number of seeds and for
    ``rows_factor`` times their rows. More rows leave only the part of the spread over seeds that is not of rows.
    """
    measured = [estimate for estimate in estimates if estimate.parts]
    if seeds < 2 or not measured:
        return Estimate(mean=0.0)
    whole = [item.parts[0][0] * len(item.per_seed) for item in measured]
    of_seed = [min((item.seed_sd or 0.0) ** 2, total) for item, total in zip(measured, whole)]
    by_seed = float(np.mean([own + (total - own) / rows_factor for own, total in zip(of_seed, whole)])) / seeds
    rows = [item.parts[1] for item in measured if len(item.parts) > 1]
    by_row = []
    if rows:
        variance = float(np.mean([variance for variance, _ in rows])) / rows_factor
        by_row = [(variance, min(degrees for _, degrees in rows) * rows_factor)]
    skewness = float(np.mean([abs(item.skewness) for item in measured])) / math.sqrt(rows_factor)
    return Estimate(mean=0.0, parts=((by_seed, seeds - 1.0), *by_row), skewness=skewness)
