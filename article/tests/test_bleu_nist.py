"""BLEU and NIST against the perl script's own answers, and against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rankwise_article.bleu_nist import mteval_statistics, tokenize

# Texts that re-implementations get wrong, each with what mteval-v13a (2009-12-01) prints for it alone.
CASES = [
    (
        "The &quot;Blue Spice&quot; costs £20-25.",
        ['The "Blue Spice" costs £20-25 .', "Blue Spice: £ 20 - 25"],
        1,
        4.1819,
    ),
    ("0 stars", ["0 stars", "It has 0 stars."], 1.0, 0.9653),
    ("", ["Something here"], 0.0, 0.0),
    ("x y", ["a b"], 0.5, 0.0),
    (
        "<b>Café</b> Rouge, 3.5/5, is 1,000m away!",
        ["Café Rouge (3.5/5) is 1,000 m away.", "CAFÉ ROUGE is far"],
        0.0988,
        1.4444,
    ),
    ("It\u00a0is\u2009near </seg> the river", ["It is near the river", "It is not near"], 0.7165, 1.8350),
    ("-", ["- -"], 0.3679, 0.0),
    ("0", ["0 0", "0"], 1.0, 0.0),
]
WHOLE = (0.4430, 3.6972)


@pytest.mark.parametrize(("prediction", "references", "bleu", "nist"), CASES)
def test_each_text_scores_as_the_script_prints(prediction, references, bleu, nist):
    statistics = mteval_statistics([prediction], [references])
    assert f"{statistics.bleu():.4f} {statistics.nist():.4f}" == f"{bleu:.4f} {nist:.4f}"


def test_the_corpus_scores_as_the_script_prints():
    statistics = mteval_statistics([case[0] for case in CASES], [case[1] for case in CASES])
    assert (round(statistics.bleu(), 4), round(statistics.nist(), 4)) == WHOLE


def test_words_are_apart_from_punctuation_but_not_inside_numbers():
    assert tokenize("Costs 1,000.50, or (less)!") == ["costs", "1,000.50", ",", "or", "(", "less", ")", "!"]
    assert tokenize("20-25 well-known É") == ["20", "-", "25", "well-known", "É"]
    assert tokenize(" \u3000 ") == []


def test_a_perfect_text_has_the_information_of_its_words():
    # Five different words, each once: log2(5) bits each; longer n-grams follow from their first words.
    statistics = mteval_statistics(["a b c d e"], [["a b c d e"]])
    assert statistics.bleu() == 1
    assert statistics.nist() == pytest.approx(math.log2(5))


def test_a_sample_of_examples_scores_as_those_examples():
    predictions = ["a b c d e", "the cat sat on the mat", "x y", "a b c e d"]
    references = [["a b c d e"], ["the cat is on the mat", "a cat sat there"], ["a b"], ["a b c d e f"]]
    statistics = mteval_statistics(predictions, references)
    rows = np.array([1, 3, 3])
    chosen = mteval_statistics([predictions[row] for row in rows], [references[row] for row in rows])
    assert statistics.bleu(rows) == pytest.approx(chosen.bleu())
    assert statistics.nist(np.arange(4)) == statistics.nist()


def test_bleu_equals_sacrebleu_on_ordinary_text():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions = ["The Mill is a cheap pub, near Café Rouge.", "It costs £20.", "A pub called Blue Spice"]
    references = [
        ["The Mill is a pub near Café Rouge. It is cheap.", "There is a cheap pub, The Mill, near Café Rouge."],
        ["It costs less than £20.", "Its price is £20."],
        ["Blue Spice is a pub.", "The pub Blue Spice"],
    ]
    streams = [[group[index] for group in references] for index in range(2)]
    expected = sacrebleu.corpus_bleu(predictions, streams, lowercase=True).score / 100
    assert mteval_statistics(predictions, references).bleu() == pytest.approx(expected)
