"""Vicuna: answers, then a judge that costs money and fails, behind a small server of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from small_engines import byte_engine, nobody, write_lines

from rankwise.errors import DataError
from rankwise.evaluation.tasks.vicuna import Judge, Vicuna

QUESTIONS = [{"question_id": n, "text": f"Question {n}?", "category": "generic"} for n in (1, 2, 3)]
REFERENCE = [{"question_id": n, "answer_id": f"reference-{n}", "text": f"Right {n}."} for n in (1, 2, 3)]


class Endpoint(HTTPServer):
    """Gives the reference 8 and the system 6, whoever stands first."""

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


def task(questions: Path, judge: Judge | None = None, **more: Any) -> Vicuna:
    given = {"limit": None, "max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 0, **more}
    return Vicuna(questions, judge=judge, **given)


def test_answers_are_written_in_the_benchmarks_form(files, tmp_path: Path):
    asked = task(files[0])
    examples = asked.run(byte_engine(), tmp_path, nobody)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["1", "2", "3"]
    assert [line["text"] for line in lines] == [example.prediction for example in examples]
    assert set(asked.summarize(examples).metrics) == {"answer_characters"}


def test_the_judge_is_asked_in_both_orders_and_paid_once(files, endpoint: Endpoint, tmp_path: Path):
    judge = Judge(f"http://127.0.0.1:{endpoint.server_port}/v1", "judge", "NO_SUCH_KEY", files[1])
    first = task(files[0], judge)
    summary = first.summarize(first.run(byte_engine(), tmp_path, nobody))
    assert endpoint.asked == 6
    assert summary.metrics == pytest.approx({"reference_first": 75, "system_first": 75, "mean": 75, "failed": 0})
    assert summary.standard_errors["mean"] == pytest.approx(0)
    ratings = [json.loads(line) for line in (tmp_path / "ratings.jsonl").read_text().splitlines()]
    assert {rating["answer1_id"] in {"reference-1", "reference-2", "reference-3"} for rating in ratings} == {
        True,
        False,
    }
    again = task(files[0], judge)
    again.summarize(again.run(byte_engine(), tmp_path, nobody))
    assert endpoint.asked == 6


def test_two_systems_are_compared_question_by_question(files, endpoint: Endpoint, tmp_path: Path):
    judge = Judge(f"http://127.0.0.1:{endpoint.server_port}/v1", "judge", "NO_SUCH_KEY", files[1])
    asked = task(files[0], judge)
    examples = asked.run(byte_engine(), tmp_path, nobody)
    assert asked.difference(examples, examples)["mean"].value == 0


def test_questions_without_a_reference_answer_are_told(files, tmp_path: Path):
    reference = write_lines(tmp_path / "short.jsonl", REFERENCE[:1])
    with pytest.raises(DataError, match="RW252.*question 2"):
        task(files[0], Judge("http://x", "judge", "KEY", reference))
    twice = write_lines(tmp_path / "twice.jsonl", [QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(DataError, match="RW251.*twice"):
        task(twice)
