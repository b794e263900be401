"""GSM8K: grade-school problems answered in words, the last number counts. Few-shot with worked examples, or bare.

    Q: <problem>  A: <worked solution>   (k times)     Q: <problem>  A:

By default the k = 8 of Wei et al. 2022, as lm-evaluation-harness has them in its task ``gsm8k_cot``.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from rankwise.data import Rows, read_rows
from rankwise.errors import DataError
from rankwise.evaluation import (
    Decoding,
    Engine,
    Example,
    Question,
    Task,
    Tell,
    harness_folder,
    text_sha256,
    write_answers,
)
from rankwise.final_number import extract_answer
from rankwise.foreign import JsonObject
from rankwise_article.scores import expected_number, is_correct, warn_of_empty

HUB = "openai/gsm8k:main"
# After its answer, a model may continue with a question of its own.
STOPS = ("Question:", "Q:")


@dataclasses.dataclass(frozen=True)
class Worked:
    """Solved problems in front of each question; ``sha256`` is of their source."""

    pairs: Sequence[tuple[str, str]] = ()
    sha256: str | None = None
    ask: str = "Question: {}\nAnswer:"

    def prompt(self, question: str) -> str:
        shown = "".join(f"{self.ask.format(asked)} {answer}\n\n" for asked, answer in self.pairs)
        return shown + self.ask.format(question)


def read_problems(data: str | None, split: str = "test") -> Rows:
    """Rows of ``question`` and ``answer``, from ``data`` or from the hub. Raises DataError (RA250) for other rows."""
    rows = read_rows(data or HUB, split=split)
    if not rows.format.startswith("question and answer"):
        raise DataError("RA250", f"gsm8k takes rows of `question` and `answer`, and {rows.source} holds {rows.format}.")
    return rows


def worked_examples(count: int, data: str | None, problems: Rows) -> Worked:
    """``count`` solved problems: the first of ``data`` that are not asked themselves, or those of Wei et al.

    Raises DataError (RA252) when there are fewer, ConfigError (RW153) without lm-evaluation-harness.
    """
    if count == 0:
        return Worked()
    if data is None:
        return _wei_examples(count)
    rows = read_problems(data, "train")
    asked = {row.prompt.strip() for row in problems}
    pairs = [(row.prompt, row.completion) for row in rows if row.prompt.strip() not in asked][:count]
    if len(pairs) < count:
        raise DataError(
            "RA252", f"{rows.source} has {len(pairs)} problems besides those asked, and --num-fewshot is {count}."
        )
    return Worked(pairs, rows.sha256)


def _wei_examples(count: int) -> Worked:
    import yaml

    path = harness_folder() / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    content = path.read_bytes()
    samples = yaml.safe_load(content)["fewshot_config"]["samples"]
    if count > len(samples):
        raise DataError(
            "RA252",
            f"there are {len(samples)} worked examples by Wei et al., and --num-fewshot is {count}; give more with "
            "--fewshot-data F (rows of question and answer).",
        )
    pairs = [(sample["question"], sample["target"]) for sample in samples[:count]]
    return Worked(pairs, hashlib.sha256(content).hexdigest(), "Q: {}\nA:")


class Gsm8k(Task):
    """``worked`` without pairs asks each problem bare, written as training writes such rows.

    Raises DataError (RA244) for an answer without a number.
    """

    name = "gsm8k"
    primary = "accuracy"
    packages = ("rankwise-article",)
    higher_is_better = {"accuracy": True}  # noqa: RUF012  read-only

    def __init__(self, problems: Rows, *, worked: Worked, limit: int | None, decoding: JsonObject) -> None:
        self.problems, self.worked, self.decoding = problems, worked, decoding
        self.rows = problems.items[:limit]
        for row in self.rows:
            expected_number(row.completion)

    def describe(self) -> JsonObject:
        return {**self.decoding, "num_fewshot": len(self.worked.pairs), "fewshot_sha256": self.worked.sha256}

    @property
    def data_sha256(self) -> str:
        return self.problems.sha256

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        encoder = engine.encoder(self.problems)
        if self.worked.pairs:
            ids = [engine.text_ids(self.worked.prompt(row.prompt)) for row in self.rows]
        else:
            ids = engine.prompt_ids(encoder, self.rows)
        questions = [
            Question(f"{number}-{text_sha256(row.prompt)}", row_ids, row.prompt, (row.completion,))
            for number, (row, row_ids) in enumerate(zip(self.rows, ids))
        ]
        stop_strings = STOPS if self.worked.pairs else ()
        stop_ids = engine.stop_ids(encoder.stop_ids())
        decoding = Decoding(stop_ids=stop_ids, stop_strings=stop_strings, **self.decoding)
        return write_answers(engine, questions, decoding, folder, tell, task=self.name, finish=_finish)

    def notes(self, examples: Sequence[Example]) -> list[str]:
        notes = warn_of_empty(self.name, examples)
        unanswered = sum(extract_answer(example.prediction) is None for example in examples)
        if unanswered:
            notes.append(f"{unanswered:,} of {len(examples):,} answers hold no number")
        return notes


def _finish(question: Question, text: str) -> Example:
    [reference] = question.references or ("",)
    scores = {"accuracy": float(is_correct(text, reference))}
    return Example(
        id=question.id, prompt=question.prompt, prediction=text.strip(), scores=scores, references=question.references
    )
