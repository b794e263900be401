"""Standard errors and paired differences of the E2E metrics, METEOR among them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from needs import needs_java
from rankwise.data import read_rows
from rankwise.evaluation.record import Example
from rankwise_article import e2e_scores
from rankwise_article.e2e import E2e

NAMES = ("Aromi", "Zizzi", "The Mill", "Loch Fyne", "Bibimbap", "Fitzbillies")
pytestmark = needs_java


def answers(texts: list[str]) -> list[Example]:
    references = [[f"{name} is a cheap place by the river.", f"By the river there is {name}."] for name in NAMES]
    return [
        Example(id=str(n), prompt=NAMES[n], prediction=text, scores={}, references=references[n])
        for n, text in enumerate(texts)
    ]


# Java takes seconds to start.
meteor, tokenized = functools.cache(e2e_scores.meteor), functools.cache(e2e_scores.ptb_tokenize)


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> E2e:
    monkeypatch.setattr(e2e_scores, "meteor", lambda texts, groups: meteor(tuple(texts), tuple(map(tuple, groups))))
    monkeypatch.setattr(e2e_scores, "ptb_tokenize", lambda texts: tokenized(tuple(texts)))
    rows = "".join(f"name[{name}],{name} is by the river.\n" for name in NAMES)
    (tmp_path / "e2e.csv").write_text(f"mr,ref\n{rows}")
    return E2e(read_rows(tmp_path / "e2e.csv"), limit=None, decoding={"num_beams": 1})


def test_every_metric_has_an_error_and_a_paired_difference(task: E2e):
    good = answers([f"{name} is a cheap place by the river." for name in NAMES])
    mixed = answers([f"{name} is {'by the river' if n % 2 else 'a bar'}." for n, name in enumerate(NAMES)])
    summary, better = task.summarize(mixed), task.summarize(good)
    found = task.difference(good, mixed)
    for name in ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"):
        assert summary.standard_errors[name] > 0
        assert found[name].value == pytest.approx(better.metrics[name] - summary.metrics[name])
        assert found[name].standard_error > 0
    assert all(mean.value == 0 == mean.standard_error for mean in task.difference(good, good).values())


def test_the_error_of_meteor_is_that_of_its_examples_mean(task: E2e):
    mixed = answers([f"{name} is {'by the river' if n % 2 else 'a bar'}." for n, name in enumerate(NAMES)])
    scores = np.array(task._scored(mixed).per_example["METEOR"])
    usual = scores.std(ddof=1) / np.sqrt(len(scores))
    assert task.summarize(mixed).standard_errors["METEOR"] == pytest.approx(usual)
