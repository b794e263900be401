"""CIDEr-D as coco-caption computes it (Vedantam et al. 2015).

    g_n(t)[w] = count(w in t) (log N - log max(1, df(w)))           w an n-gram, df: examples with w in a reference
    sim_n(c, r) = <min(g_n(c), g_n(r)), g_n(r)> / (|g_n(c)| |g_n(r)|)  exp(-(l_c - l_r)^2 / (2 s^2)),  s = 6
    CIDEr = 10 mean_n mean_r sim_n(c, r),   n = 1..4

``l`` is the number of bigrams in the text, as there. N counts the examples given, so a subset scores differently.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rankwise.evaluation.metrics.bleu_nist import ngrams

ORDER = 4
SIGMA = 6.0


class Weighted(NamedTuple):
    """tf-idf weights of one text by n-gram length, their norms, and the number of its bigrams."""

    weights: Sequence[Mapping[tuple[str, ...], float]]
    norms: Sequence[float]
    bigrams: int


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of each tokenized prediction against its tokenized references; their mean is the corpus score."""
    counted = [[ngrams(text.split(), ORDER) for text in group] for group in references]
    frequency = Counter(ngram for group in counted for ngram in set().union(*group))
    log_n = math.log(len(predictions)) if predictions else 0.0
    idf = {ngram: log_n - math.log(count) for ngram, count in frequency.items()}
    scores = []
    for prediction, group in zip(predictions, counted, strict=True):
        c = _weighted(ngrams(prediction.split(), ORDER), idf, log_n)
        sims = [_similarity(c, _weighted(counts, idf, log_n)) for counts in group]
        scores.append(10.0 * sum(sims) / len(sims))
    return scores


def _weighted(counts: Mapping[tuple[str, ...], int], idf: Mapping[tuple[str, ...], float], log_n: float) -> Weighted:
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDER)]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, log_n)
    norms = [math.sqrt(sum(value * value for value in part.values())) for part in weights]
    return Weighted(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(c: Weighted, r: Weighted) -> float:
    """Mean of ``sim_n`` over n."""
    total = 0.0
    for mine, theirs, norm_c, norm_r in zip(c.weights, r.weights, c.norms, r.norms):
        product = sum(min(value, theirs[ngram]) * theirs[ngram] for ngram, value in mine.items() if ngram in theirs)
        total += product / (norm_c * norm_r) if norm_c and norm_r else product
    return total / ORDER * math.exp(-((c.bigrams - r.bigrams) ** 2) / (2 * SIGMA**2))
