"""ROUGE-L as coco-caption computes it: an F measure of the longest common subsequence (Lin 2004).

    P = max_r LCS(c, r) / |c|        R = max_r LCS(c, r) / |r|        F = (1 + b^2) P R / (R + b^2 P),  b = 1.2

The maxima are taken apart, so P and R may come from different references.
"""

from __future__ import annotations

from collections.abc import Sequence

BETA_SQUARED = 1.2**2


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F of one tokenized prediction (words between single spaces) against its tokenized references, in [0, 1]."""
    # An empty text splits into one empty word, and two empty texts match: coco-caption does so too.
    c = prediction.split(" ")
    common = [(_lcs_length(c, r), len(r)) for r in (reference.split(" ") for reference in references)]
    P = max(lcs / len(c) for lcs, _ in common)
    R = max(lcs / length for lcs, length in common)
    return (1 + BETA_SQUARED) * P * R / (R + BETA_SQUARED * P) if P and R else 0.0


def _lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence; bit i of ``open_`` is 0 where a[:i + 1] adds one (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << index
    mask = (1 << len(a)) - 1
    open_ = mask
    for word in b:
        matched = open_ & places.get(word, 0)
        open_ = ((open_ + matched) | (open_ - matched)) & mask
    return len(a) - open_.bit_count()
