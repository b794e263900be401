"""ROUGE-L and CIDEr by coco-caption: known values, and what it does not allow for."""

from __future__ import annotations

import pytest

from rankwise_article.e2e_scores import rouge_l_and_cider

pytest.importorskip("pycocoevalcap.cider.cider", reason="needs the extra `eval`")


def rouge_l(prediction: str, references: list[str]) -> float:
    return rouge_l_and_cider([prediction], [references])[0][0]


def cider(predictions: list[str], references: list[list[str]]) -> list[float]:
    return rouge_l_and_cider(predictions, references)[1]


def test_known_values():
    assert rouge_l("a b c", ["a b c"]) == pytest.approx(1)
    assert rouge_l("x", ["a b"]) == 0
    # P = 1 from either, R = 1/2 from the first: (1 + 1.44) / 2 / (1/2 + 1.44)
    assert rouge_l("a", ["a b", "a b c"]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))
    # The longest common subsequence of these is "b d": P = 2/3, R = 1/2.
    assert rouge_l("b x d", ["a b c d"]) == pytest.approx(2.44 * (2 / 3) * 0.5 / (0.5 + 1.44 * 2 / 3))
    # Each n-gram is in one example of two and each text is its reference: every cosine is 1.
    assert cider(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]]) == pytest.approx([10, 10])
    # What all examples have in common tells nothing.
    assert cider(["a b c d"] * 2, [["a b c d"]] * 2) == [0, 0]


def test_references_without_a_word_are_scored():
    """A reference of punctuation alone is empty behind the tokenizer."""
    assert rouge_l_and_cider(["a", ""], [[""], ["", ""]]) == ([0.0, pytest.approx(1.0)], [0.0, 0.0])
