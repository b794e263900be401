"""E2E NLG: one description for each meaning representation, scored against all references of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
from rankwise.foreign import JsonObject
from rankwise_article.e2e_scores import METRICS, E2eScores, missing_java, score_e2e
from rankwise_article.scores import warn_of_empty

# Resamples of the bootstrap for BLEU and NIST. They give the standard error to about 5 %.
RESAMPLES = 200
RESAMPLED = ("BLEU", "NIST")


class E2e(Task):
    """``rows`` of prompt (meaning representation) and completion (reference); equal prompts are one question.

    ``num_beams`` 10, ``length_penalty`` 0.9 and ``no_repeat_ngram_size`` 4 are the LoRA paper's (table 11).
    """

    name = "e2e"
    primary = "BLEU"
    packages = ("rankwise-article", "pycocoevalcap")
    higher_is_better = dict.fromkeys(METRICS, True)

    def __init__(self, rows: Rows, *, limit: int | None, decoding: JsonObject) -> None:
        if rows.kind != "prompt":
            raise DataError(
                "RA250",
                f"e2e takes rows of `mr` and `ref` (or context||reference lines), and {rows.source} "
                f"holds {rows.format}.",
            )
        self.rows, self.decoding = rows, decoding
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.prompt, []).append(row)
        self.groups = dict(list(groups.items())[:limit])
        self._scores: dict[tuple[str, ...], E2eScores] = {}

    def describe(self) -> JsonObject:
        return {**self.decoding, "meaning_representations": len(self.groups)}

    def is_final(self, result: TaskResult) -> bool:
        """Metrics that Java was missing for are computed once it is there."""
        return set(METRICS) <= set(result.metrics) or missing_java() is not None

    @property
    def data_sha256(self) -> str:
        return self.rows.sha256

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        encoder = engine.encoder(self.rows)
        ids = engine.prompt_ids(encoder, [rows[0] for rows in self.groups.values()])
        questions = [
            Question(text_sha256(prompt, 16), row_ids, prompt.rstrip("\n"), tuple(row.completion for row in rows))
            for (prompt, rows), row_ids in zip(self.groups.items(), ids)
        ]
        decoding = Decoding(stop_ids=engine.stop_ids(encoder.stop_ids()), **self.decoding)
        return write_answers(engine, questions, decoding, folder, tell, task=self.name, finish=_finish)

    def with_scores(self, examples: Sequence[Example]) -> Sequence[Example]:
        """METEOR, ROUGE_L and CIDEr of each answer; CIDEr weighs words by the whole set of references."""
        scores = self._scored(examples).per_example
        return [
            dataclasses.replace(example, scores={name: values[index] for name, values in scores.items()})
            for index, example in enumerate(examples)
        ]

    def summarize(self, examples: Sequence[Example]) -> Summary:
        scores = self._scored(examples)
        notes = [*warn_of_empty(self.name, examples), *([scores.missing] if scores.missing else [])]
        present = {name: value for name, value in scores.metrics.items() if value is not None}
        return Summary(present, {name: _error(name, _sample(scores, name)) for name in present}, notes)

    def difference(self, a: Sequence[Example], b: Sequence[Example]) -> dict[str, Mean]:
        """The difference of each metric. BLEU and NIST take a bootstrap's error, the others that of the paired
        differences.
        """
        of_a, of_b = self._scored(a), self._scored(b)
        found: dict[str, Mean] = {}
        for name in METRICS:
            values = of_a.metrics[name], of_b.metrics[name]
            if values[0] is not None and values[1] is not None:
                error = _error(name, _sample(of_a, name) - _sample(of_b, name))
                found[name] = Mean(values[0] - values[1], error, len(a))
        return found

    def _scored(self, examples: Sequence[Example]) -> E2eScores:
        texts = tuple(example.prediction for example in examples)
        if texts not in self._scores:
            self._scores[texts] = score_e2e(texts, [list(example.references or ()) for example in examples])
        return self._scores[texts]


def _finish(question: Question, text: str) -> Example:
    # References are single lines; the scorers read a line an answer.
    return Example(
        id=question.id,
        prompt=question.prompt,
        prediction=" ".join(text.split()),
        scores={},
        references=question.references,
    )


def _sample(scores: E2eScores, name: str) -> np.ndarray:
    """BLEU or NIST on resamples of the examples, which are the same for every system; else each example's score."""
    if name not in RESAMPLED:
        return np.array(scores.per_example[name])
    metric: Callable[[np.ndarray], float] = getattr(scores.statistics, name.lower())
    random, count = np.random.default_rng(0), len(scores.statistics.closest)
    return np.array([metric(random.integers(0, count, count)) for _ in range(RESAMPLES)])


def _error(name: str, sample: np.ndarray) -> float | None:
    """METEOR of a corpus is not a mean: its error is that of the mean of its examples' scores."""
    return float(sample.std(ddof=1)) if name in RESAMPLED else mean_of(sample.tolist()).standard_error
