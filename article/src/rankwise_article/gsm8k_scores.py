"""GSM8K: whether the final number of a solution is correct (Cobbe et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from rankwise.errors import DataError, warn
from rankwise.final_number import extract_answer
from rankwise_article.files import read_records, shortened


@dataclasses.dataclass(frozen=True)
class Gsm8kScores:
    """Which of N predictions end with the correct number."""

    right: tuple[bool, ...]
    # Predictions without any number.
    unanswered: int

    @property
    def correct(self) -> int:
        return sum(self.right)

    @property
    def total(self) -> int:
        return len(self.right)

    def to_json(self) -> dict[str, int]:
        return {"correct": self.correct, "total": self.total}


def is_correct(prediction: str, reference: str) -> bool:
    """Whether both end in the same number: 18, 18.0, $18 and 18 eggs are equal. Raises DataError (RA244)."""
    return extract_answer(prediction) == expected_number(reference)


def expected_number(reference: str) -> Fraction:
    """The final number of a reference. Raises DataError (RA244) if it has none."""
    number = extract_answer(reference)
    if number is None:
        raise DataError("RA244", f"the reference {shortened(reference)} holds no number to compare with.")
    return number


def score_gsm8k(predictions: Sequence[str], references: Sequence[str]) -> Gsm8kScores:
    """Score N predictions against N references. Raises DataError: RA232 different counts, RA244 no number."""
    if len(predictions) != len(references):
        raise DataError("RA232", f"there are {len(predictions):,} predictions and {len(references):,} references.")
    right = tuple(is_correct(prediction, reference) for prediction, reference in zip(predictions, references))
    return Gsm8kScores(right, sum(extract_answer(prediction) is None for prediction in predictions))


def read_gsm8k(predictions: Path, references: Path) -> tuple[list[str], list[str]]:
    """The texts of two files, in the order of their lines.

    Raises DataError: RA230, RA238 a file cannot be read, RA232 different counts, RA233 a prediction for a question
    other than that of its reference, RA239 nothing to score.
    """
    given, known = read_records(predictions), read_records(references)
    if not given:
        raise DataError("RA239", f"{predictions} holds no predictions; write one JSON object a line.")
    if len(given) != len(known):
        raise DataError(
            "RA232", f"{predictions} has {len(given):,} predictions and {references} {len(known):,} answers."
        )
    for own, other in zip(given, known):
        asked, answered = own.fields.get("question"), other.fields.get("question")
        if asked is not None and answered is not None and asked != answered:
            raise DataError(
                "RA233",
                f"line {own.line} of {predictions} and line {other.line} of {references} hold different questions; "
                "give both in one order.",
            )
    texts = [record.text(predictions, "prediction") for record in given]
    empty = sum(not text.strip() for text in texts)
    if empty:
        warn("RA235", f"{empty:,} of {len(texts):,} predictions are empty; they count as wrong.")
    return texts, [record.text(references, "answer") for record in known]
