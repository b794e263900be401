"""The official scores of the challenge's systems, and what happens where Java is missing or fails."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from needs import needs_java
from rankwise.errors import DataError
from rankwise_article import e2e_scores
from rankwise_article.bleu_nist import mteval_statistics
from rankwise_article.e2e_scores import METRICS, ON_JAVA, meteor, ptb_tokenize, read_e2e, score_e2e
from tables import long

SYSTEMS = ("adapt", "harv", "slug", "tgen", "tr2", "tuda")


def official(shared: Path, system: str) -> dict[str, float]:
    scores = json.loads((shared / "e2e" / "expected_scores.json").read_text())["scores"][system]
    return {name: round(scores.get(f"{name}_pl", scores.get(name)), 4) for name in METRICS}


@pytest.mark.parametrize("system", [*SYSTEMS[:2], *long([(name,) for name in SYSTEMS[2:]])])
def test_bleu_and_nist_are_the_official_ones(system, shared):
    texts = read_e2e(shared / "e2e" / "systems" / f"{system}.tsv", shared / "e2e" / "testset_w_refs.csv")
    statistics = mteval_statistics(*texts)
    expected = official(shared, system)
    assert (round(statistics.bleu(), 4), round(statistics.nist(), 4)) == (expected["BLEU"], expected["NIST"])


@needs_java
@pytest.mark.slow
@pytest.mark.parametrize("system", [SYSTEMS[0], *long([(name,) for name in SYSTEMS[1:]])])
def test_all_five_are_the_official_ones(system, shared):
    texts = read_e2e(shared / "e2e" / "systems" / f"{system}.tsv", shared / "e2e" / "testset_w_refs.csv")
    scores = score_e2e(*texts)
    assert scores.to_json() == {**official(shared, system), "count": 630}
    assert {name: len(scores.per_example[name]) for name in ON_JAVA} == dict.fromkeys(ON_JAVA, 630)


@needs_java
def test_a_line_in_is_a_line_out_whatever_it_holds():
    texts = ["", "The U.S.", 'says "hi"', "a\u2028b\x0cc\rd", "", "£20 Café", "don't (stop)", ""]
    expected = ["", "the u.s.", "says hi", "a b c d", "", "# 20 café", "do n't -lrb- stop -rrb-", ""]
    assert ptb_tokenize(texts) == expected


@needs_java
def test_empty_predictions_are_scored():
    scores = score_e2e(["", "The Mill is a pub."], [["The Mill is cheap."], ["The Mill is a pub."]])
    assert scores.per_example["METEOR"][0] == 0
    assert scores.per_example["METEOR"][1] == pytest.approx(1)
    assert 0 < scores.metrics["BLEU"] < 1


@pytest.mark.filterwarnings("ignore:RA236")
def test_without_java_the_others_are_computed(monkeypatch):
    monkeypatch.setattr(e2e_scores.shutil, "which", lambda name: None)
    scores = score_e2e(["a b c d e"], [["a b c d e"]])
    assert scores.metrics == {"BLEU": 1.0, "NIST": pytest.approx(2.3219, abs=1e-4), **dict.fromkeys(ON_JAVA)}
    assert scores.missing
    assert "install" in scores.missing
    assert scores.to_json()["METEOR"] is None


@pytest.mark.filterwarnings("ignore:RA236")
def test_without_the_extra_the_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(e2e_scores, "PACKAGE", "no_such_package")
    assert "pip install pycocoevalcap" in str(score_e2e(["a"], [["a"]]).missing)


def fake_java(folder, monkeypatch, script):
    path = folder / "java"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(e2e_scores, "file_of", lambda name: path)


@pytest.mark.parametrize(
    "script",
    [
        "exit 1",
        "read line; echo 1.0 2.0; read line; exit 9",
        "for n in 1 2 3; do read line; echo 1.0; done; read line; echo word; echo 1; echo 1; echo 1",
    ],
)
def test_meteor_that_fails_is_one_clear_error(script, tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, script)
    with pytest.raises(DataError, match="RA237: the Java program METEOR stopped"):
        meteor(["a"] * 3, [["a"]] * 3)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'java.lang.OutOfMemoryError: heap' >&2; exit 3", "exit code 3: java.lang.OutOfMemoryError"),
        ("exit 1", "it said nothing"),
        ("head -n 2", "gave 2 lines instead of 3"),
    ],
)
def test_a_failing_program_is_one_clear_error(script, said, tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, script)
    with pytest.raises(DataError, match=said) as caught:
        score_e2e(["a"], [["a", "b", "c"]])
    assert caught.value.code == "RA237"


def test_a_prediction_without_a_reference_is_refused():
    with pytest.raises(DataError, match="RA233"):
        score_e2e(["a"], [[""]])
