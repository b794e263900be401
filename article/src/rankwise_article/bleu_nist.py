"""BLEU and NIST as the script mteval-v13a computes them on what the E2E challenge's scorer gives it.

    BLEU = min(1, exp(1 - L / c_1)) (prod_n m_n / c_n)^(1/4)                 n = 1..4 (Papineni et al. 2002)
    NIST = sum_n I_n / c_n  exp(-beta min(0, log(c_1 / R))^2)                n = 1..5 (Doddington 2002)

``m_n`` matched and ``c_n`` all n-grams of the predictions, ``L`` the sum of the closest reference lengths, ``I_n`` the
information of the matched n-grams, ``R`` the words of an average reference, and ``beta`` such that a ratio of 2/3 is
penalised by one half. The information of an n-gram is ``log2(count(its first n-1 words) / count(it))`` over all
references. Each sum runs over the examples, so both scores of any sample of examples come from ``MtevalStatistics``.

The script's habits are kept, since published figures contain them: n-grams that do not occur at all count as matched,
unmatched ones as 1/2, 1/4, ... of a match; a first reference without words stays a candidate for the closest length;
and a single word ``0`` counts as an empty history.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLEU_ORDER = 4
NIST_ORDER = 5
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# Perl's \s; Python's also takes the separators 0x1c to 0x1f.
SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
PUNCTUATION = re.compile(r"([{-~\[-` -&(-+:-@/])")
RULES = (
    (PUNCTUATION, r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
SPACES = re.compile(f"{SPACE}+")
END_OF_SEGMENT = re.compile(f"</seg{SPACE}*>", re.IGNORECASE)
ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
# A prediction this many times shorter than the references keeps half of its NIST.
HALF_AT = 1.5

Words = Sequence[str]


def tokenize(text: str) -> list[str]:
    """The words of ``text``: entities are resolved, ASCII is lower-cased, and punctuation is separated except in
    numbers.
    """
    text = SPACES.sub(" ", END_OF_SEGMENT.split(text, maxsplit=1)[0]).replace("<skipped>", "")
    for entity, character in ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} ".translate(ASCII_LOWER)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return SPACES.sub(" ", text).strip(" ").split(" ") if not SPACES.fullmatch(text) else []


@dataclasses.dataclass(frozen=True)
class MtevalStatistics:
    """The statistics of N examples for BLEU and NIST. Sums over examples give the scores of a corpus."""

    # (N, 4): n-grams of the prediction that a reference has, each as often as in the reference that has it most.
    matches: NDArray[np.int64]
    # (N, 5): n-grams of the prediction.
    counts: NDArray[np.int64]
    # (N, 5): information of the matched n-grams, in bits.
    information: NDArray[np.float64]
    # (N,): words of the reference closest in length to the prediction.
    closest: NDArray[np.int64]
    # (N,): words of all references together.
    reference_words: NDArray[np.int64]
    # (N,): references that are not empty.
    references: NDArray[np.int64]

    def bleu(self, rows: NDArray[np.int64] | None = None) -> float:
        """BLEU of the examples ``rows`` (indices, may repeat), or of all."""
        c = self._sum(self.counts, rows)
        if c[0] == 0:
            return 0.0
        precisions = _smoothed_log_precisions(self._sum(self.matches, rows), c)
        penalty = min(0.0, 1.0 - float(self._sum(self.closest, rows)) / float(c[0]))
        return math.exp(sum(precisions) / BLEU_ORDER) * math.exp(penalty)

    def nist(self, rows: NDArray[np.int64] | None = None) -> float:
        """NIST of the examples ``rows`` (indices, may repeat), or of all."""
        c = self._sum(self.counts, rows)
        examples = len(self.closest if rows is None else rows)
        average = float(self._sum(self.references, rows)) / examples
        words = float(self._sum(self.reference_words, rows)) / average if average else 0.0
        ratio = float(c[0]) / words if words else math.inf
        return float((self._sum(self.information, rows) / np.maximum(c, 1)).sum()) * _length_penalty(ratio)

    def _sum(self, values: NDArray[Any], rows: NDArray[np.int64] | None) -> NDArray[Any]:
        return (values if rows is None else values[rows]).sum(axis=0)


def _smoothed_log_precisions(matches: NDArray[Any], counts: NDArray[Any]) -> list[float]:
    """``log(m_n / c_n)``; the k-th order without a match has ``m_n = 2^-k``, and an order without n-grams 0."""
    logs, smooth = [], 1
    for m, c in zip(matches.tolist(), counts.tolist()):
        if c and not m:
            smooth *= 2
        logs.append(math.log((m or 1 / smooth) / c) if c else 0.0)
    return logs


def _length_penalty(ratio: float) -> float:
    if ratio >= 1:
        return 1.0
    if ratio <= 0:
        return 0.0
    beta = math.log(2) / math.log(HALF_AT) ** 2
    return math.exp(-beta * math.log(ratio) ** 2)


def mteval_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MtevalStatistics:
    """Statistics of N predictions against their references. The information comes from all references."""
    tokenized = [[tokenize(text) for text in group] for group in references]
    information = ngram_information(words for group in tokenized for words in group)
    pairs = zip(predictions, tokenized, strict=True)
    rows = [_example(tokenize(prediction), group, information) for prediction, group in pairs]
    return MtevalStatistics(*map(np.array, zip(*rows)))


def ngrams(words: Words, longest: int = NIST_ORDER) -> Counter[tuple[str, ...]]:
    """How often each n-gram of up to ``longest`` words occurs."""
    return Counter(
        tuple(words[start : start + n]) for n in range(1, longest + 1) for start in range(len(words) - n + 1)
    )


def ngram_information(texts: Iterable[Words]) -> dict[tuple[str, ...], float]:
    """``log2(count(w_1..w_n-1) / count(w_1..w_n))``. The history of a single word is the number of all words."""
    counts: Counter[tuple[str, ...]] = Counter()
    total = 0
    for words in texts:
        counts.update(ngrams(words))
        total += len(words)
    # In Perl the text "0" is false, so mteval treats a history of this one word as no history.
    return {
        ngram: -math.log2(count / (counts[ngram[:-1]] if ngram[:-1] not in ((), ("0",)) else total))
        for ngram, count in counts.items()
    }


def _example(words: Words, group: Sequence[Words], information: dict[tuple[str, ...], float]) -> tuple[Any, ...]:
    """One row of every field of MtevalStatistics."""
    most: Counter[tuple[str, ...]] = Counter()
    for reference in group:
        most |= ngrams(reference)
    matches, info = [0] * NIST_ORDER, [0.0] * NIST_ORDER
    for ngram, count in ngrams(words).items():
        matched = min(count, most[ngram])
        if matched:
            matches[len(ngram) - 1] += matched
            info[len(ngram) - 1] += matched * information[ngram]
    counts = [max(0, len(words) - n + 1) for n in range(1, NIST_ORDER + 1)]
    lengths = [len(reference) for reference in group]
    candidates = [length for index, length in enumerate(lengths) if length or index == 0]
    closest = min(candidates, key=lambda length: (abs(length - len(words)), length))
    return matches[:BLEU_ORDER], counts, info, closest, sum(lengths), sum(length > 0 for length in lengths)
