"""Relative scores of ratings, by hand and as published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.errors import DataError
from rankwise_article.scores import relative_score, score_vicuna

REFERENCE = {"r1", "r2"}


def row(first: object, second: str, score: object) -> dict:
    return {"answer1_id": first, "answer2_id": second, "score": score}


def test_the_published_score_of_published_ratings(shared):
    folder = shared / "vicuna"
    expected = json.loads((folder / "expected_relative_scores.json").read_text())["13b-guanaco"]
    files = sorted((folder / "ratings_relative").glob("*.jsonl"))
    document = score_vicuna(files, folder / "answer_gpt35.jsonl").to_json()
    assert document == {
        "reference_first": expected["gpt35_first"],
        "system_first": expected["system_first"],
        "mean": expected["mean"],
        "failed": 0,
    }


def test_orders_come_from_the_ids_and_failures_are_left_out():
    ratings = [
        row("r1", "a", [8, 6]),
        row("r2", "b", [2, 1]),
        row("a", "r1", [9, 6]),
        row("b", "r2", [-1, -1]),
        row("b", "r2", None),
        row("b", "r2", [9, float("nan")]),
        row("b", "r2", [9]),
        row("b", "r2", "9 9"),
        row("b", "r2", [1e308, 1e308]),
        row("b", "r2", [10**400, 1]),
    ]
    score = relative_score(ratings, REFERENCE)
    assert score.to_json() == {"reference_first": 70.0, "system_first": 150.0, "mean": 110.0, "failed": 7}


def test_a_rating_of_zero_counts_and_a_reference_without_marks_has_no_percentage():
    score = relative_score([row("r1", "a", [8, 0]), row("r2", "b", [2, 5]), row("a", "r1", [5, 0])], REFERENCE)
    assert score.to_json() == {"reference_first": 50.0, "system_first": None, "mean": 50.0, "failed": 0}


def test_one_order_alone_has_no_other():
    score = relative_score([row("r1", "a", [8, 6])], REFERENCE)
    assert score.to_json() == {"reference_first": 75.0, "system_first": None, "mean": 75.0, "failed": 0}


@pytest.mark.parametrize(
    ("ratings", "code"),
    [
        ([row("a", "b", [1, 1])], "RA240"),
        ([row("r1", "r2", [1, 1])], "RA240"),
        ([row(["r1"], "a", [1, 1])], "RA240"),
        ([{"answer1_id": "r1", "score": [1, 1]}], "RA240"),
        ([row("r1", "a", [-1, -1])], "RA239"),
    ],
)
def test_what_cannot_be_compared_is_refused(ratings, code):
    with pytest.raises(DataError) as caught:
        relative_score(ratings, REFERENCE)
    assert caught.value.code == code


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("answers", "ratings", "code"),
    [
        ([{"answer_id": "r1"}], [], "RA239"),
        ([], [row("r1", "a", [1, 1])], "RA239"),
        ([{"answer_id": "r1"}] * 2, [row("r1", "a", [1, 1])], "RA234"),
        ([{"id": "r1"}], [row("r1", "a", [1, 1])], "RA238"),
    ],
)
def test_bad_files_are_refused(answers, ratings, code, tmp_path):
    with pytest.raises(DataError) as caught:
        score_vicuna([write(tmp_path / "ratings.jsonl", ratings)], write(tmp_path / "answers.jsonl", answers))
    assert caught.value.code == code
