"""Answers of the adapted models beside the base model's, by the task's own score of each example.

Where answers are right or wrong, that is said; otherwise a score is higher or lower, which is no judgement of an
answer. The examples shown are not chosen by hand: they are spread evenly over those of each outcome.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from rankwise.foreign import Fields
from rankwise.reports.comparison import Comparison
from rankwise.reports.numbers import shortened, significant, visible

# The outcomes of a method whose score is better, worse, and the same.
RIGHT_OR_WRONG = ("now right", "now wrong", "as right or wrong as before")
AGAINST_A_CONSTANT = (
    "right where the constant is wrong",
    "wrong where the constant is right",
    "as right or wrong as the constant",
)
# Number of examples that are shown for each outcome, method and task.
SHOWN = 4
LONGEST_TEXT = 1200
# The end of an answer that its limit of tokens ended.
CUT = " … (cut at the limit of tokens)"


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with the base model's answer and the method's, each with its score in words."""

    prompt: str
    references: Sequence[str]
    base: tuple[str, str]
    answer: tuple[str, str]
    outcome: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """One method against the base model on one task: the number of each outcome, and some examples of each."""

    method: str
    # What was answered, in words: a task, or the rows of the evaluation data.
    place: str
    counts: Mapping[str, int]
    shown: Sequence[Example]


def answers_of(comparison: Comparison) -> list[Answers]:
    """The answers of each method to each task that the base model was measured on; the recommended method first."""
    chosen = comparison["recommendation"]["method"]
    found = []
    for task in comparison["base"]["tasks"]:
        base = comparison.answers_of(comparison["base"], task)
        for name in sorted(comparison.ranked(), key=lambda name: name != chosen):
            rows = comparison.answers_of(_shown_run(comparison, name), task)
            if any(row["prediction"] for row in rows.values()):
                found.append(_compared(comparison, task, name, base, rows))
    return [answers for answers in found if answers.counts]


def _shown_run(comparison: Comparison, method: str) -> Fields:
    """The recommended run if it is this method's, else the method's final run with the lowest seed."""
    runs = [run for run in comparison.finals if run["method"] == method]
    return min(runs, key=lambda run: (run["id"] != comparison["recommendation"]["run"], run["seed"]))


def _compared(
    comparison: Comparison, task: str, method: str, base: Mapping[str, Fields], rows: Mapping[str, Fields]
) -> Answers:
    place = "the evaluation rows" if task in ("perplexity", "labels") else visible(task)
    result = comparison["base"]["tasks"][task]
    known = next(iter(rows.values()))["scores"]
    score = result["primary"] if result["primary"] in known else min(known, default="")
    pairs = [(base[key], rows[key]) for key in base if key in rows and score in base[key]["scores"]]
    higher = result["higher_is_better"].get(score, True)
    is_right = all(row["scores"][score] in (0, 1) for pair in pairs for row in pair)
    more, less = f"higher {visible(score)}", f"lower {visible(score)}"
    words = (more, less, f"same {visible(score)}") if higher else (less, more, f"same {visible(score)}")
    if is_right:
        words = AGAINST_A_CONSTANT if comparison.objective == "classify" else RIGHT_OR_WRONG

    def answer(row: Fields) -> tuple[str, str]:
        value = row["scores"][score]
        right = "right" if (value == 1) == higher else "wrong"
        text = row["prediction"] + CUT * row.get("is_cut", False)
        return _clean(text), right if is_right else f"{visible(score)} {significant(value)}"

    examples: dict[str, list[Example]] = {word: [] for word in words}
    for before, after in pairs:
        old, new = before["scores"][score], after["scores"][score]
        is_same = math.isclose(old, new, rel_tol=1e-6)
        outcome = words[2] if is_same else words[0] if (new > old) == higher else words[1]
        references = [_clean(text) for text in (before.get("references") or ())[:3]]
        prompt = _clean(before["prompt"])
        examples[outcome].append(Example(prompt, references, answer(before), answer(after), outcome))
    shown = [item for found in examples.values() for item in evenly(_changed_first(found), SHOWN)]
    return Answers(method, place, {word: len(found) for word, found in examples.items() if pairs}, shown)


def evenly(items: Sequence[Example], count: int) -> list[Example]:
    """``count`` of the items, spread evenly over the whole list."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def _changed_first(items: Sequence[Example]) -> Sequence[Example]:
    """The items whose two answers differ, if there are any: equal texts show nothing."""
    answered = [item for item in items if item.base[0] and item.answer[0]]
    return [item for item in answered if item.base[0] != item.answer[0]] or answered


def _clean(text: str) -> str:
    return visible(shortened(text, LONGEST_TEXT)).strip()
