"""Vicuna: answers, then a judge that costs money and fails, behind a small server of our own."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.errors import DataError, RankwiseWarning
from rankwise.evaluation.record import Example, rewrite
from rankwise_article.judge import JudgeClient
from rankwise_article.vicuna import Vicuna
from small_engines import byte_engine, nobody, write_lines

QUESTIONS = [{"question_id": n, "text": f"Question {n}?", "category": "generic"} for n in (1, 2, 3)]
REFERENCE = [{"question_id": n, "answer_id": f"reference-{n}", "text": f"Right {n}."} for n in (1, 2, 3)]


class Endpoint(HTTPServer):
    """Gives the reference 8 and the system 6, whoever comes first."""

    asked = 0


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked += 1
        first = body.index("Right") < body.index("answer_2")
        marks = "8 6" if first else "6 8"
        reply = json.dumps({"choices": [{"message": {"content": f"{marks}\nbecause."}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_lines(tmp_path / "questions.jsonl", QUESTIONS), write_lines(tmp_path / "reference.jsonl", REFERENCE)


def task(questions: Path, answers: Path | None = None, endpoint: Endpoint | None = None) -> Vicuna:
    decoding = {"max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    port = endpoint.server_port if endpoint else 1
    judge = JudgeClient(f"http://127.0.0.1:{port}/v1", "judge") if answers else None
    return Vicuna(questions, limit=None, decoding=decoding, judge=judge, reference_answers=answers)


def test_answers_are_written_in_the_benchmarks_form(files, tmp_path: Path):
    asked = task(files[0])
    examples = asked.run(byte_engine(), tmp_path, nobody)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["1", "2", "3"]
    assert [line["text"] for line in lines] == [example.prediction for example in examples]
    assert set(asked.summarize(examples).metrics) == {"answer_characters"}


def test_the_judge_is_asked_in_both_orders_and_paid_once(files, endpoint: Endpoint, tmp_path: Path):
    first = task(*files, endpoint)
    summary = first.summarize(first.run(byte_engine(), tmp_path, nobody))
    assert endpoint.asked == 6
    assert summary.metrics == pytest.approx({"reference_first": 75, "system_first": 75, "mean": 75, "failed": 0})
    assert summary.standard_errors["mean"] == pytest.approx(0)
    ratings = [json.loads(line) for line in (tmp_path / "ratings.jsonl").read_text().splitlines()]
    assert {rating["answer1_id"] in {"reference-1", "reference-2", "reference-3"} for rating in ratings} == {
        True,
        False,
    }
    again = task(*files, endpoint)
    again.summarize(again.run(byte_engine(), tmp_path, nobody))
    assert endpoint.asked == 6


def test_two_systems_are_compared_question_by_question(files, endpoint: Endpoint, tmp_path: Path):
    asked = task(*files, endpoint)
    examples = asked.run(byte_engine(), tmp_path, nobody)
    assert asked.difference(examples, examples)["mean"].value == 0


def test_other_reference_answers_are_another_judgement(files, tmp_path: Path):
    other = write_lines(tmp_path / "other.jsonl", [{**row, "text": f"{row['text']}!"} for row in REFERENCE])
    settings = [task(files[0], path).extra_settings() for path in (files[1], other)]
    assert settings[0] != settings[1]
    copied = write_lines(tmp_path / "copied.jsonl", REFERENCE)
    assert task(files[0], copied).extra_settings() == settings[0]


def test_without_a_judge_the_marks_of_an_earlier_one_are_left_out(files, endpoint: Endpoint, tmp_path: Path):
    rewrite(tmp_path, task(*files, endpoint).run(byte_engine(), tmp_path, nobody))
    alone = task(files[0])
    assert set(alone.summarize(alone.run(byte_engine(), tmp_path, nobody)).metrics) == {"answer_characters"}


def rated(marks: np.ndarray) -> list[Example]:
    """Questions with (reference, system) marks in both orders; (n, 2, 2), NaN for a rating that failed."""
    examples = []
    for number, orders in enumerate(marks):
        rows = []
        for (reference, system), first in zip(orders, (True, False)):
            sides = [(f"reference-{number}", reference), (f"s{number}", system)][:: 1 if first else -1]
            score = [-1, -1] if np.isnan(reference) else [mark for _, mark in sides]
            rows.append({"answer1_id": sides[0][0], "answer2_id": sides[1][0], "score": score})
        examples.append(Example(id=str(number), prompt="", prediction="text", scores={}, details={"ratings": rows}))
    return examples


def percent(marks: np.ndarray) -> float:
    return float(np.mean([100 * np.nansum(marks[:, o, 1]) / np.nansum(marks[:, o, 0]) for o in (0, 1)]))


def test_a_difference_is_that_of_the_metrics_and_its_error_a_ratios(tmp_path: Path):
    draw = np.random.default_rng(0)
    count = 80
    questions = write_lines(tmp_path / "q.jsonl", [{"question_id": n, "text": "?"} for n in range(count)])
    answers = [{"question_id": n, "answer_id": f"reference-{n}", "text": "."} for n in range(count)]
    asked = task(questions, write_lines(tmp_path / "r.jsonl", answers))
    hard = draw.uniform(1, 9, (count, 1, 1))
    a, b = (np.clip(hard + draw.normal(0, 1.5, (count, 2, 2)) + shift, 1, 10) for shift in (0.5, 0.0))
    b[3, 1] = np.nan
    first, second = rated(a), rated(b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankwiseWarning)
        summaries = [asked.summarize(side) for side in (first, second)]
    [found] = [asked.difference(first, second)["mean"]]
    assert found.value == pytest.approx(percent(a) - percent(b))
    assert found.value == pytest.approx(summaries[0].metrics["mean"] - summaries[1].metrics["mean"])
    samples = [draw.integers(0, count, count) for _ in range(2000)]
    resampled = np.array([percent(a[rows]) - percent(b[rows]) for rows in samples])
    assert found.standard_error == pytest.approx(resampled.std(), rel=0.15)
    alone = np.array([percent(a[rows]) for rows in samples]).std()
    assert summaries[0].standard_errors["mean"] == pytest.approx(alone, rel=0.15)
    assert all(summaries[0].standard_errors[name] > 0 for name in ("reference_first", "system_first"))


def test_many_questions_are_read_in_little_time(tmp_path: Path):
    questions = write_lines(tmp_path / "questions.jsonl", [{"question_id": n, "text": "?"} for n in range(20_000)])
    began = time.process_time()
    assert len(task(questions).asked) == 20_000
    assert time.process_time() - began < 2


def test_questions_without_a_reference_answer_are_told(files, tmp_path: Path):
    reference = write_lines(tmp_path / "short.jsonl", REFERENCE[:1])
    with pytest.raises(DataError, match="RA252.*question 2"):
        task(files[0], reference)
    both = write_lines(tmp_path / "both.jsonl", [*REFERENCE, {**REFERENCE[0], "answer_id": "of another system"}])
    with pytest.raises(DataError, match="RA234.*question_id .1."):
        task(files[0], both)
    twice = write_lines(tmp_path / "twice.jsonl", [QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(DataError, match="RA234.*question_id"):
        task(twice)
