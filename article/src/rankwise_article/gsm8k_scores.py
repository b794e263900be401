"""GSM8K: whether the final number of a solution is correct (Cobbe et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from rankwise.errors import DataError, some_of, warn
from rankwise.final_number import extract_answer
from rankwise_article.files import Line, no_duplicates, read_records, shortened


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
    """The final number of a reference. Raises DataError (RA244) where it has none."""
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
    """The texts of two files, joined by ``question`` where both have it, else in the order they stand in.

    Raises DataError: RA230, RA238 a file cannot be read, RA232 different counts, RA233 a question without a
    reference, RA234 a question or an `id` twice, RA239 nothing to score.
    """
    given, known = read_records(predictions), read_records(references)
    if not given:
        raise DataError("RA239", f"{predictions} holds no predictions; write one JSON object a line.")
    for path, rows in ((predictions, given), (references, known)):
        named = [row for row in rows if row.fields.get("id") is not None]
        no_duplicates(path, "id", [str(row.fields["id"]) for row in named], [row.line for row in named])
    pairs = _joined(predictions, given, references, known)
    texts = [record.text(predictions, "prediction") for record, _ in pairs]
    empty = sum(not text.strip() for text in texts)
    if empty:
        warn("RA235", f"{empty:,} of {len(texts):,} predictions are empty; they count as wrong.")
    return texts, [record.text(references, "answer") for _, record in pairs]


def _joined(
    predictions: Path, given: Sequence[Line], references: Path, known: Sequence[Line]
) -> list[tuple[Line, Line]]:
    asked, answered = (_questions(rows) for rows in (given, known))
    if asked is None or answered is None or asked == answered:
        _same_count(predictions, given, references, known)
        return list(zip(given, known))
    for path, questions, rows in ((predictions, asked, given), (references, answered, known)):
        no_duplicates(path, "question", questions, [row.line for row in rows])
    place = dict(zip(answered, known))
    strange = [row for row, question in zip(given, asked) if question not in place]
    if strange:
        lines = some_of((str(row.line) for row in strange), 3)
        raise DataError(
            "RA233",
            f"{predictions}: {references} has no answer to the questions of lines {lines}; "
            "give the references of the same questions.",
        )
    if len(given) != len(known):
        missing = next(row for row, question in zip(known, answered) if question not in set(asked))
        raise DataError(
            "RA232",
            f"{predictions} has {len(given):,} predictions and {references} {len(known):,} answers; the first question "
            f"without a prediction stands in line {missing.line}: {shortened(missing.text(references, 'question'))}.",
        )
    return [(row, place[question]) for row, question in zip(given, asked)]


def _questions(rows: Sequence[Line]) -> list[str] | None:
    """The questions of all rows, or None where one has none."""
    if not all(isinstance(row.fields.get("question"), str) for row in rows):
        return None
    return [row.fields["question"].strip() for row in rows]


def _same_count(predictions: Path, given: Sequence[Line], references: Path, known: Sequence[Line]) -> None:
    if len(given) != len(known):
        path, rows = (predictions, given) if len(given) > len(known) else (references, known)
        first = rows[min(len(given), len(known))].line
        raise DataError(
            "RA232",
            f"{predictions} has {len(given):,} predictions and {references} {len(known):,} answers; "
            f"line {first} of {path} is the first without a counterpart.",
        )
