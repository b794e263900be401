"""Vicuna: answers to open questions. With a judge, its ratings of them against a reference system's answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rankwise.data import Row, Rows
from rankwise.errors import DataError
from rankwise.evaluation import (
    Decoding,
    Engine,
    Example,
    Mean,
    Question,
    Summary,
    Task,
    TaskResult,
    Tell,
    mean_of,
    text_sha256,
    write_answers,
)
from rankwise.foreign import Fields, JsonObject
from rankwise.records import write_text
from rankwise_article.judge import JudgeClient, judge_answers
from rankwise_article.scores import no_duplicates, rating, read_records, relative_score, warn_of_empty

# Where there is no chat template: the form that the QLoRA paper's models were trained on.
GUANACO = "### Human: {}\n### Assistant:"
GUANACO_STOPS = ("### Human",)
ANSWERS_FILE, RATINGS_FILE, CACHE_FILE = "answers.jsonl", "ratings.jsonl", "judge.jsonl"
ORDERS = ("reference_first", "system_first", "mean")


class Vicuna(Task):
    """``data`` holds ``question_id`` and ``text``. Each rating is requested once: ``judge.jsonl`` keeps every reply."""

    name = "vicuna"
    primary = "mean"
    packages = ("rankwise-article",)
    higher_is_better = dict.fromkeys((*ORDERS, "answer_characters"), True) | {"failed": False}

    def __init__(
        self,
        data: Path,
        *,
        limit: int | None,
        decoding: JsonObject,
        judge: JudgeClient | None = None,
        reference_answers: Path | None = None,
    ) -> None:
        self.data, self.judge, self.decoding, self.reference_answers = data, judge, decoding, reference_answers
        rows = read_records(data, "question_id", "text")
        no_duplicates(data, "question_id", [row["question_id"] for row in rows])
        self.asked = [(row["question_id"], row["text"]) for row in rows][:limit]
        self.references = _read_answers(reference_answers, self.asked) if reference_answers else {}
        self.reference_ids = {answer_id for answer_id, _ in self.references.values()}

    def describe(self) -> JsonObject:
        return dict(self.decoding)

    def extra_settings(self) -> JsonObject:
        if self.judge is None or self.reference_answers is None:
            return {}
        answers = hashlib.sha256(self.reference_answers.read_bytes()).hexdigest()
        return {"judge": {"url": self.judge.url, "model": self.judge.model, "reference_answers_sha256": answers}}

    def is_final(self, result: TaskResult) -> bool:
        """Failed ratings are requested again."""
        return not result.metrics.get("failed")

    @property
    def data_sha256(self) -> str:
        return hashlib.sha256(self.data.read_bytes()).hexdigest()

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        questions, stops, stop_ids = self._questions(engine)
        decoding = Decoding(stop_ids=engine.stop_ids(stop_ids), stop_strings=stops, **self.decoding)
        # The folder may hold the marks of a judge who was asked before.
        examples = [
            dataclasses.replace(example, scores={}, details={})
            for example in write_answers(engine, questions, decoding, folder, tell, task=self.name, finish=_finish)
        ]
        _write_lines(folder / ANSWERS_FILE, [_answer(example, engine) for example in examples])
        return self._judged(self.judge, examples, folder, tell) if self.judge else examples

    def _questions(self, engine: Engine) -> tuple[list[Question], tuple[str, ...], set[int]]:
        stops: tuple[str, ...] = ()
        stop_ids: set[int] = set()
        if engine.template is None and not engine.tokenizer.chat_template:
            ids = [engine.text_ids(GUANACO.format(text)) for _, text in self.asked]
            stops = GUANACO_STOPS
        else:
            # The completion is a placeholder: only the ids before it are used.
            items = [
                Row(kind="prompt", source=str(self.data), line=n, prompt=text, completion="-")
                for n, (_, text) in enumerate(self.asked)
            ]
            encoder = engine.encoder(
                Rows(items=items, kind="prompt", source=str(self.data), sha256=self.data_sha256, format="questions")
            )
            ids, stop_ids = engine.prompt_ids(encoder, items), encoder.stop_ids()
        return [Question(name, row, text) for (name, text), row in zip(self.asked, ids)], stops, stop_ids

    def _judged(self, judge: JudgeClient, examples: Sequence[Example], folder: Path, tell: Tell) -> list[Example]:
        ratings = judge_answers(
            self.asked,
            [self.references[name] for name, _ in self.asked],
            [(_answer_id(example), example.prediction) for example in examples],
            client=judge,
            kept=folder / CACHE_FILE,
            progress=tell,
        )
        _write_lines(folder / RATINGS_FILE, ratings)
        # All with the reference's answer first, and then all with the system's.
        pairs = zip(examples, ratings, ratings[len(examples) :])
        rated = [dataclasses.replace(example, details={"ratings": both}) for example, *both in pairs]
        sums = self._marks(rated).sum(1).tolist()
        return [
            dataclasses.replace(example, scores={"reference": reference, "system": system})
            for example, (reference, system) in zip(rated, sums)
        ]

    def summarize(self, examples: Sequence[Example]) -> Summary:
        notes = warn_of_empty(self.name, examples)
        if not _ratings(examples):
            length = mean_of([len(example.prediction) for example in examples])
            return Summary({"answer_characters": length.value}, {"answer_characters": length.standard_error}, notes)
        score = relative_score(_ratings(examples), self.reference_ids)
        shares = self._shares(examples)
        metrics = {name: getattr(score, name) for name in shares} | {"failed": float(score.failed)}
        return Summary(metrics, {"failed": None} | {name: _error(of) for name, of in shares.items()}, notes)

    def difference(self, a: Sequence[Example], b: Sequence[Example]) -> dict[str, Mean]:
        """The difference of each metric. Its error is that of the questions' shares ``u_q(a) - u_q(b)``."""
        shares_a, shares_b = self._shares(a), self._shares(b)
        names = [name for name in ORDERS if name in shares_a and name in shares_b]
        if not names:
            return {}
        of_a, of_b = (relative_score(_ratings(side), self.reference_ids) for side in (a, b))
        return {
            name: Mean(getattr(of_a, name) - getattr(of_b, name), _error(shares_a[name] - shares_b[name]), len(a))
            for name in names
        }

    def _shares(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        r"""The share (n,) of each question in the error of a metric, over the orders that were rated: linear in its
        questions to first order, so that shares of both orders and of two systems add up question by question.

        reference_first, system_first: of m = 100 S / R,  u_q = 100 (s_q - S / R r_q) / R;   mean: the mean of both u_q
        """
        found: dict[str, np.ndarray] = {}
        for name, (r, s) in zip(ORDERS, self._marks(examples).transpose(1, 2, 0)):
            if r.sum():
                found[name] = 100 * (s - s.sum() / r.sum() * r) / r.sum()
        return found | ({"mean": np.mean(list(found.values()), axis=0)} if found else {})

    def _marks(self, examples: Sequence[Example]) -> np.ndarray:
        """(n, 2, 2): of each question, with the reference's answer first and second, the marks of the reference and
        the system; zeros where the rating failed.
        """
        marks = np.zeros((len(examples), 2, 2))
        for number, example in enumerate(examples):
            for row in example.details.get("ratings", ()):
                reference_first, pair = rating(row, self.reference_ids)
                marks[number, 1 - reference_first] += pair or (0, 0)
        return marks


def _ratings(examples: Sequence[Example]) -> list[Fields]:
    return [row for example in examples for row in example.details.get("ratings", ())]


def _finish(question: Question, text: str) -> Example:
    return Example(id=question.id, prompt=question.prompt, prediction=text.strip())


def _answer_id(example: Example) -> str:
    return text_sha256(json.dumps([example.id, example.prediction]), 22)


def _answer(example: Example, engine: Engine) -> JsonObject:
    """A line as the benchmark's own tools write it."""
    return {
        "answer_id": _answer_id(example),
        "model_id": str(engine.model.config.name_or_path),
        "question_id": example.id,
        "text": example.prediction,
    }


def _write_lines(path: Path, rows: Sequence[Fields]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))


def _read_answers(path: Path, asked: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """question_id -> (answer_id, text). Raises DataError: RA234 two answers to a question, RA252 none to one."""
    rows = read_records(path, "question_id", "answer_id", "text")
    no_duplicates(path, "question_id", [row["question_id"] for row in rows])
    answers = {row["question_id"]: (row["answer_id"], row["text"]) for row in rows}
    missing = [name for name, _ in asked if name not in answers]
    if missing:
        raise DataError(
            "RA252", f"{path} answers {len(answers)} questions, and not question {missing[0]} ({len(missing)} missing)."
        )
    return answers


def _error(shares: np.ndarray) -> float | None:
    """``sqrt(n / (n - 1) sum_i u_i^2)``, the standard error; None for fewer than two questions."""
    n = len(shares)
    return math.sqrt(n / (n - 1) * float((shares**2).sum())) if n > 1 else None
