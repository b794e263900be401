"""Vicuna: answers to open questions. With a judge, its ratings of them against a reference system's answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
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
from rankwise_article.files import no_duplicates, read_records, warn_of_empty

NEW_TOKENS = 1024
# Where there is no chat template: the form that the QLoRA paper's models were trained on.
GUANACO = "### Human: {}\n### Assistant:"
GUANACO_STOPS = ("### Human",)
ANSWERS_FILE, RATINGS_FILE, CACHE_FILE = "answers.jsonl", "ratings.jsonl", "judge.jsonl"
FIRST = {"reference_first": True, "system_first": False}
ORDERS = (*FIRST, "mean")


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judging model behind an OpenAI-compatible endpoint; the key is read from the environment."""

    url: str
    model: str
    key_variable: str
    reference_answers: Path


class Vicuna(Task):
    """``data`` holds ``question_id`` and ``text``. Each rating is requested once: ``judge.jsonl`` keeps every reply."""

    name = "vicuna"
    primary = "mean"
    packages = ("rankwise-article",)
    higher_is_better = {  # noqa: RUF012  read-only
        "reference_first": True,
        "system_first": True,
        "mean": True,
        "failed": False,
        "answer_characters": True,
    }

    def __init__(self, data: Path, *, limit: int | None, decoding: JsonObject, judge: Judge | None) -> None:
        self.data, self.judge, self.decoding = data, judge, {"max_new_tokens": NEW_TOKENS, **decoding}
        self.asked = _read_questions(data)[:limit]
        self.references = _read_answers(judge.reference_answers, self.asked) if judge else {}

    def describe(self) -> JsonObject:
        return dict(self.decoding)

    def extra_settings(self) -> JsonObject:
        if self.judge is None:
            return {}
        answers = hashlib.sha256(self.judge.reference_answers.read_bytes()).hexdigest()
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
        examples = write_answers(engine, questions, decoding, folder, tell, task=self.name, finish=_finish)
        _write_lines(folder / ANSWERS_FILE, [_answer(example, engine) for example in examples])
        if self.judge:
            return self._judged(examples, folder, tell)
        # The folder may hold the marks of a judge who was asked before.
        return [dataclasses.replace(example, scores={}, details={}) for example in examples]

    def _questions(self, engine: Engine) -> tuple[list[Question], tuple[str, ...], set[int]]:
        stops: tuple[str, ...] = ()
        stop_ids: set[int] = set()
        if engine.template is None and not engine.tokenizer.chat_template:
            ids = [engine.text_ids(GUANACO.format(text)) for _, text in self.asked]
            stops = GUANACO_STOPS
        else:
            # The completion is a placeholder: only the ids before it are used.
            items = [
                Row("prompt", str(self.data), n, prompt=text, completion="-") for n, (_, text) in enumerate(self.asked)
            ]
            encoder = engine.encoder(Rows(items, "prompt", str(self.data), self.data_sha256, "questions"))
            ids, stop_ids = engine.prompt_ids(encoder, items), encoder.stop_ids()
        return [Question(name, row, text) for (name, text), row in zip(self.asked, ids)], stops, stop_ids

    def _judged(self, examples: Sequence[Example], folder: Path, tell: Tell) -> list[Example]:
        from rankwise_article import judge as judging

        assert self.judge is not None
        client = judging.JudgeClient(self.judge.url, self.judge.model, judging.judge_key(self.judge.key_variable))
        ratings = judging.judge_answers(
            self.asked,
            [self.references[name] for name, _ in self.asked],
            [(_answer_id(example), example.prediction) for example in examples],
            client=client,
            cache=judging.JudgeCache(folder / CACHE_FILE),
            progress=tell,
        )
        _write_lines(folder / RATINGS_FILE, ratings)
        reference_ids = self._reference_ids()
        marks: dict[str, list[Fields]] = {}
        for rating in ratings:
            marks.setdefault(rating["question_id"], []).append(rating)
        return [dataclasses.replace(e, **_marked(marks[e.id], reference_ids)) for e in examples]

    def summarize(self, examples: Sequence[Example]) -> Summary:
        notes = warn_of_empty(self.name, examples)
        if not _ratings(examples):
            length = mean_of([len(example.prediction) for example in examples])
            return Summary({"answer_characters": length.value}, {"answer_characters": length.standard_error}, notes)
        from rankwise_article.vicuna_scores import relative_score, warn_of_failed

        score = relative_score(_ratings(examples), self._reference_ids())
        warn_of_failed(score)
        found = {name: getattr(score, name) for name in ORDERS}
        metrics = {name: value for name, value in found.items() if value is not None} | {"failed": float(score.failed)}
        shares = self._shares(examples)
        errors = dict.fromkeys(metrics) | {name: error_of_shares(shares[name]) for name in ORDERS if name in shares}
        return Summary(metrics, errors, notes)

    def difference(self, a: Sequence[Example], b: Sequence[Example]) -> dict[str, Mean]:
        """The difference of each metric. Its error is that of the questions' shares ``u_q(a) - u_q(b)``."""
        from rankwise_article.vicuna_scores import relative_score

        shares_a, shares_b = self._shares(a), self._shares(b)
        names = [name for name in ORDERS if name in shares_a and name in shares_b]
        if not names:
            return {}
        of_a, of_b = (relative_score(_ratings(side), self._reference_ids()) for side in (a, b))
        return {
            name: Mean(
                getattr(of_a, name) - getattr(of_b, name), error_of_shares(shares_a[name] - shares_b[name]), len(a)
            )
            for name in names
        }

    def _shares(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        r"""The linearised share of each question in the error of a metric, over the orders that were rated.

        reference_first, system_first: of m = 100 S / R,  u_q = 100 (s_q - S / R r_q) / R;   mean: the mean of both u_q
        """
        found: dict[str, np.ndarray] = {}
        for name, reference_first in FIRST.items():
            marks = np.array([self._marks(example, reference_first) for example in examples]).reshape(-1, 2)
            if marks[:, 0].sum():
                found[name] = 100 * shares_of_ratio(marks[:, 1], marks[:, 0])
        return found | ({"mean": np.mean(list(found.values()), axis=0)} if found else {})

    def _marks(self, example: Example, reference_first: bool) -> tuple[float, float]:
        """The ratings of the reference and the system in one of the orders; zeros where that failed."""
        ids = self._reference_ids()
        rows = [r for r in example.details.get("ratings", ()) if (r["answer1_id"] in ids) == reference_first]
        return _sums(rows, ids)

    def _reference_ids(self) -> set[str]:
        return {answer_id for answer_id, _ in self.references.values()}


def _ratings(examples: Sequence[Example]) -> list[Fields]:
    return [row for example in examples for row in example.details.get("ratings", ())]


def _marked(ratings: Sequence[Fields], reference_ids: set[str]) -> JsonObject:
    """Scores of one question: marks of the reference and the system, summed over the orders that were rated."""
    reference, system = _sums(ratings, reference_ids)
    return {"scores": {"reference": reference, "system": system}, "details": {"ratings": list(ratings)}}


def _sums(ratings: Sequence[Fields], reference_ids: set[str]) -> tuple[float, float]:
    from rankwise_article.vicuna_scores import score_pair

    reference = system = 0.0
    for row in ratings:
        pair = score_pair(row["score"])
        if pair is not None:
            first, second = pair if row["answer1_id"] in reference_ids else pair[::-1]
            reference, system = reference + first, system + second
    return reference, system


def _finish(question: Question, text: str) -> Example:
    return Example(question.id, question.prompt, text.strip())


def _answer_id(example: Example) -> str:
    return text_sha256(json.dumps([example.id, example.prediction]), 22)


def _answer(example: Example, engine: Engine) -> JsonObject:
    """A line as the benchmark's own tools write it."""
    model = str(engine.model.config.name_or_path)
    return {
        "answer_id": _answer_id(example),
        "model_id": model,
        "question_id": example.id,
        "text": example.prediction,
    }


def _write_lines(path: Path, rows: Sequence[Fields]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))


def _read_questions(path: Path) -> list[tuple[str, str]]:
    rows = [(row.text(path, "question_id"), row.text(path, "text", "question")) for row in read_records(path)]
    counts = Counter(name for name, _ in rows)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice or not rows:
        problem = f"question_id {', '.join(twice)} twice" if twice else "no questions"
        raise DataError("RW251", f"{path} holds {problem}; give one line a question.")
    return rows


def _read_answers(path: Path, asked: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """question_id -> (answer_id, text). Raises DataError: RA234 two answers to a question, RA252 none to one."""
    rows = read_records(path)
    names = [row.text(path, "question_id") for row in rows]
    no_duplicates(path, "question_id", names, [row.line for row in rows])
    answers = {name: (row.text(path, "answer_id"), row.text(path, "text")) for name, row in zip(names, rows)}
    missing = [name for name, _ in asked if name not in answers]
    if missing:
        raise DataError(
            "RA252", f"{path} answers {len(answers)} questions, and not question {missing[0]} ({len(missing)} missing)."
        )
    return answers


def shares_of_ratio(s: np.ndarray, r: np.ndarray) -> np.ndarray:
    """(n,) shares ``u`` of the questions in the error of ``m = sum s / sum r``, linear in its questions to first order:
    ``m - E m ~ sum u_i``, so that shares of several ratios and of two systems add up question by question.
    """
    total = r.sum()
    return (s - s.sum() / total * r) / total


def error_of_shares(shares: np.ndarray) -> float | None:
    """``sqrt(n / (n - 1) sum_i u_i^2)``, the standard error; None for fewer than two questions."""
    n = len(shares)
    return math.sqrt(n / (n - 1) * float((shares**2).sum())) if n > 1 else None
