"""Answers of the adapted models beside the base model's: won, lost or tied, by the task's own score of each example.

The examples shown are not chosen by hand: they are spread evenly over those of each outcome.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from rankwise.foreign import Fields, Json
from rankwise.reports.folder import Comparison
from rankwise.reports.numbers import is_number, shortened, visible

Outcome = Literal["won", "lost", "tied"]
OUTCOMES: tuple[Outcome, ...] = ("won", "lost", "tied")
# Number of examples that are shown for each outcome, method and task.
SHOWN = 4
LONGEST_TEXT = 1200
# The task that scores the evaluation data itself, by the loss of each row.
EVALUATION_ROWS = "perplexity"
LOSSES = ("loss", "perplexity", "nll", "ter", "wer")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One model's answer to one example; ``method`` is None for the base model."""

    method: str | None
    text: str
    score: float | None


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with the base model's answer, the method's, and that of one other method."""

    id: str
    prompt: str
    references: tuple[str, ...]
    base: Answer
    answer: Answer
    other: Answer | None
    outcome: Outcome

    @property
    def is_changed(self) -> bool:
        return self.base.text != self.answer.text


@dataclasses.dataclass(frozen=True)
class Answers:
    """One method against the base model on one task: the number of each outcome, and some examples of each."""

    task: str
    method: str
    other: str | None
    run: str
    score: str
    counts: Mapping[Outcome, int]
    unchanged: int
    shown: tuple[Example, ...]

    @property
    def place(self) -> str:
        """What was answered, in words: a task, or the rows of the evaluation data."""
        return "the evaluation rows" if self.task == EVALUATION_ROWS else self.task

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def answers_of(comparison: Comparison) -> list[Answers]:
    """The answers for each task and method, where both the method and the base model have them.

    The recommended method comes first.
    """
    order = comparison.with_result()
    chosen = comparison["recommendation"].get("method")
    methods = sorted(order, key=lambda name: name != chosen)
    tasks = list(comparison["base"].get("tasks", {}))
    found = []
    for task in tasks:
        base = {str(row.get("id")): row for row in comparison.base_answers(task)}
        rows = {name: _rows(comparison, name, task) for name in methods} if base else {}
        for name in methods:
            if rows.get(name):
                other = next((rival for rival in methods if rival != name and _has_text(rows[rival])), None)
                found.append(_compare(comparison, task, name, other, base, rows))
    return [answers for answers in found if answers is not None]


def shown_run(comparison: Comparison, method: str) -> Fields | None:
    """The recommended run if it is this method's, else the method's final run with the lowest seed."""
    runs = sorted(comparison.finals_of(method), key=lambda run: run["seed"])
    chosen = comparison["recommendation"].get("run")
    return next((run for run in runs if run["id"] == chosen), next(iter(runs), None))


def evenly(items: Sequence[Example], count: int) -> list[Example]:
    """``count`` of the items, spread evenly over the whole list."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def _rows(comparison: Comparison, method: str, task: str) -> dict[str, Fields]:
    run = shown_run(comparison, method)
    if run is None or task not in run["tasks"]:
        return {}
    return {str(row.get("id")): row for row in comparison.answers_of(run, task)}


def _compare(
    comparison: Comparison,
    task: str,
    method: str,
    other: str | None,
    base: Mapping[str, Fields],
    rows: Mapping[str, Mapping[str, Fields]],
) -> Answers | None:
    result = comparison["base"]["tasks"][task]
    score = _score_name(result, base, rows[method])
    common = [key for key in base if key in rows[method]]
    if score is None or not common or not _has_text(rows[method]):
        return None
    sign = 1 if _is_higher_better(result, score) else -1
    rival = rows[other] if other else {}
    examples = []
    for key in common:
        answers = [_answer(None, base[key], score), _answer(method, rows[method][key], score)]
        answers += [_answer(other, rival[key], score)] if key in rival else []
        examples.append(_example(key, base[key], rows[method][key].get("prompt"), answers, sign))
    kept = {outcome: [item for item in examples if item.outcome == outcome] for outcome in OUTCOMES}
    shown = [item for found in kept.values() for item in evenly(_changed_first(found), SHOWN)]
    run = shown_run(comparison, method)
    counts = {outcome: len(found) for outcome, found in kept.items()}
    unchanged = sum(bool(item.answer.text) and not item.is_changed for item in examples)
    name = visible(run["id"]) if run else ""
    return Answers(visible(task), method, other, name, visible(score), counts, unchanged, tuple(shown))


def _changed_first(items: Sequence[Example]) -> Sequence[Example]:
    """The items whose two answers differ, if there are any: equal texts show nothing."""
    answered = [item for item in items if item.base.text and item.answer.text]
    return [item for item in answered if item.is_changed] or answered


def _example(key: str, base: Fields, prompt: Json, answers: Sequence[Answer], sign: int) -> Example:
    """An example from ``answers``: the base's, the method's, and where there is one the other method's."""
    before, after, *others = answers
    references = base.get("references") or ()
    return Example(
        key,
        _clean(base.get("prompt") or prompt or ""),
        tuple(_clean(text) for text in references[:3]) if isinstance(references, list) else (),
        before,
        after,
        next(iter(others), None),
        _outcome(before.score, after.score, sign),
    )


def _outcome(before: float | None, after: float | None, sign: int) -> Outcome:
    """Won, lost or tied. Scores that are equal to six digits are tied, and so are answers without a score."""
    if before is None or after is None:
        return "tied"
    gap = sign * (after - before)
    if abs(gap) <= 1e-6 * max(abs(before), abs(after)):
        return "tied"
    return "won" if gap > 0 else "lost"


def _answer(method: str | None, row: Fields, score: str) -> Answer:
    value = _scores(row).get(score)
    return Answer(method, _clean(_text(row)), value if is_number(value) else None)


def _has_text(rows: Mapping[str, Fields]) -> bool:
    return any(_text(row) for row in rows.values())


def _text(row: Fields) -> str:
    return str(row.get("prediction") or "")


def _clean(text: Json) -> str:
    return visible(shortened(str(text), LONGEST_TEXT)).strip()


def _scores(row: Fields) -> Fields:
    scores = row.get("scores")
    return scores if isinstance(scores, Mapping) else {}


def _score_name(result: Fields, base: Mapping[str, Fields], rows: Mapping[str, Fields]) -> str | None:
    """The task's primary metric if the examples have it, else the first score that both sides have."""
    first = next((_scores(base[key]).keys() & _scores(rows[key]).keys() for key in base if key in rows), set())
    primary = result.get("primary")
    return str(primary) if primary in first else min(first, default=None)


def _is_higher_better(result: Fields, score: str) -> bool:
    stated = result.get("higher_is_better") or {}
    return bool(stated.get(score, score.lower() not in LOSSES))
