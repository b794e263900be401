"""Answers of the adapted models beside the base model's, by the task's own score of each example.

Where answers are right or wrong, that is said; otherwise a score is higher or lower, which is no judgement of an
answer. The examples shown are not chosen by hand: they are spread evenly over those of each outcome.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from rankwise.foreign import Fields, Json
from rankwise.reports.comparison import Comparison
from rankwise.reports.numbers import is_number, shortened, significant, visible

# How the method's score compares with the base model's.
Change = Literal["better", "worse", "same"]
RIGHT_OR_WRONG: dict[Change, str] = {"better": "now right", "worse": "now wrong", "same": "as right or wrong as before"}
AGAINST_A_CONSTANT: dict[Change, str] = {
    "better": "right where the constant is wrong",
    "worse": "wrong where the constant is right",
    "same": "as right or wrong as the constant",
}
# Number of examples that are shown for each outcome, method and task.
SHOWN = 4
LONGEST_TEXT = 1200
# The end of an answer that its limit of tokens ended.
CUT = " … (cut at the limit of tokens)"
# The tasks that score the evaluation data itself.
EVALUATION_ROWS = ("perplexity", "labels")
LOSSES = ("loss", "perplexity", "nll", "ter", "wer")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One model's answer to one example; ``method`` is None for the base model."""

    method: str | None
    text: str
    score: float | None
    # The score in words: ``loss 1.23``, or whether the answer is right.
    judgement: str


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with the base model's answer and the method's."""

    id: str
    prompt: str
    references: tuple[str, ...]
    base: Answer
    answer: Answer
    change: Change
    # In words: ``lower loss``, ``now right``.
    outcome: str

    @property
    def is_changed(self) -> bool:
        return self.base.text != self.answer.text


@dataclasses.dataclass(frozen=True)
class Answers:
    """One method against the base model on one task: the number of each outcome, and some examples of each."""

    task: str
    method: str
    run: str
    # {outcome in words: examples of it}.
    counts: Mapping[str, int]
    unchanged: int
    shown: tuple[Example, ...]

    @property
    def place(self) -> str:
        """What was answered, in words: a task, or the rows of the evaluation data."""
        return "the evaluation rows" if self.task in EVALUATION_ROWS else self.task

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
                found.append(_compare(comparison, task, name, base, rows[name]))
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
    comparison: Comparison, task: str, method: str, base: Mapping[str, Fields], rows: Mapping[str, Fields]
) -> Answers | None:
    result = comparison["base"]["tasks"][task]
    score = _score_name(result, base, rows)
    common = [key for key in base if key in rows]
    if score is None or not common or not any(map(_text, rows.values())):
        return None
    higher = _is_higher_better(result, score)
    scored = [_scores(row).get(score) for side in (base, rows) for row in side.values()]
    is_right = set(scored) <= {0, 1}
    right = AGAINST_A_CONSTANT if comparison.objective == "classify" else RIGHT_OR_WRONG
    words = right if is_right else _score_words(visible(score), higher=higher)
    examples = []
    for key in common:
        before = _answer(None, base[key], score, higher, is_right=is_right)
        after = _answer(method, rows[key], score, higher, is_right=is_right)
        references = base[key].get("references") or ()
        change = _change(before.score, after.score, 1 if higher else -1)
        examples.append(
            Example(
                key,
                _clean(base[key].get("prompt") or rows[key].get("prompt") or ""),
                tuple(_clean(text) for text in references[:3]) if isinstance(references, list) else (),
                before,
                after,
                change,
                words[change],
            )
        )
    kept = {change: [item for item in examples if item.change == change] for change in words}
    shown = [item for found in kept.values() for item in evenly(_changed_first(found), SHOWN)]
    run = shown_run(comparison, method)
    counts = {words[change]: len(found) for change, found in kept.items()}
    unchanged = sum(bool(item.answer.text) and not item.is_changed for item in examples)
    name = visible(run["id"]) if run else ""
    return Answers(visible(task), method, name, counts, unchanged, tuple(shown))


def _score_words(score: str, *, higher: bool) -> dict[Change, str]:
    better, worse = ("higher", "lower") if higher else ("lower", "higher")
    return {"better": f"{better} {score}", "worse": f"{worse} {score}", "same": f"same {score}"}


def _changed_first(items: Sequence[Example]) -> Sequence[Example]:
    """The items whose two answers differ, if there are any: equal texts show nothing."""
    answered = [item for item in items if item.base.text and item.answer.text]
    return [item for item in answered if item.is_changed] or answered


def _change(before: float | None, after: float | None, sign: int) -> Change:
    """Scores that are equal to six digits are the same, and so are answers without a score."""
    if before is None or after is None:
        return "same"
    gap = sign * (after - before)
    if abs(gap) <= 1e-6 * max(abs(before), abs(after)):
        return "same"
    return "better" if gap > 0 else "worse"


def _answer(method: str | None, row: Fields, score: str, higher: bool, *, is_right: bool) -> Answer:
    value = _scores(row).get(score)
    if not is_number(value):
        return Answer(method, _clean(_text(row)), None, "")
    right = "right" if (value == 1) == higher else "wrong"
    return Answer(method, _clean(_text(row)), value, right if is_right else f"{visible(score)} {significant(value, 3)}")


def _text(row: Fields) -> str:
    return str(row.get("prediction") or "") + CUT * bool(row.get("is_cut"))


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
