"""ROUGE-L and CIDEr against coco-caption's own code, a brute force and known values."""

from __future__ import annotations

import random

import pytest

from rankwise.evaluation.metrics.cider import cider
from rankwise.evaluation.metrics.rouge_l import _lcs_length, rouge_l

WORDS = ["the", "a", "pub", "mill", "is", "near", "cheap", "river", "20", "in", "it", "of", "blue", "spice"]


def texts(seed: int, examples: int = 12) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(0, 14)))

    return [text() for _ in range(examples)], [[text() for _ in range(draw.randint(1, 4))] for _ in range(examples)]


def slow_lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + slow_lcs(a[:-1], b[:-1])
    return max(slow_lcs(a[:-1], b), slow_lcs(a, b[:-1]))


@pytest.mark.parametrize("seed", range(20))
def test_the_common_subsequence_is_that_of_the_definition(seed):
    draw = random.Random(seed)
    a, b = ([draw.choice("xyz") for _ in range(draw.randint(0, 8))] for _ in range(2))
    assert _lcs_length(a, b) == slow_lcs(a, b)


def test_known_values():
    assert rouge_l("a b c", ["a b c"]) == pytest.approx(1)
    assert rouge_l("x", ["a b"]) == 0
    # P = 1 from either, R = 1/2 from the first: (1 + 1.44) / 2 / (1/2 + 1.44)
    assert rouge_l("a", ["a b", "a b c"]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))
    # Each n-gram stands in one example of two and each text is its reference: every cosine is 1.
    assert cider(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]]) == pytest.approx([10, 10])
    # What all examples have in common tells nothing.
    assert cider(["a b c d"] * 2, [["a b c d"]] * 2) == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_both_equal_coco_caption(seed):
    oracle = pytest.importorskip("pycocoevalcap.cider.cider", reason="needs the extra `eval`")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge", reason="needs the extra `eval`")
    predictions, references = texts(seed)
    gts = dict(enumerate(references))
    res = {index: [text] for index, text in enumerate(predictions)}
    assert cider(predictions, references) == pytest.approx(list(oracle.Cider().compute_score(gts, res)[1]), abs=1e-12)
    expected = list(rouge.Rouge().compute_score(gts, res)[1])
    assert [rouge_l(*row) for row in zip(predictions, references)] == pytest.approx(expected, abs=1e-12)
