"""Texts and ratings in files, and the scores of GSM8K and Vicuna made of them.

GSM8K: whether the final number of a solution is correct (Cobbe et al. 2021).
Vicuna: a judge's ratings of two systems as a percentage of the reference's (Dettmers et al. 2023),

    score = 100 sum_q s_q / sum_q r_q        s: the system's ratings, r: the reference's, over questions q

taken once with the reference's answer shown first and once with the system's, since judges favour the first.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path

from rankwise.data import BadRow, read_file
from rankwise.errors import DataError, warn
from rankwise.evaluation import Example
from rankwise.final_number import extract_answer
from rankwise.foreign import Fields, Json, JsonObject

DECIMALS = 2
# Judges are asked for 1 to 10, and a file may hold any scale from 0. Numbers near the largest float would add up to
# infinity.
LARGEST_RATING = 1e6


def read_records(path: Path, *names: str) -> list[JsonObject]:
    """JSON lines, or one JSON array of objects, whose fields ``names`` become text.

    Raises DataError: RA238 for a row without one of them, RA239 without rows, and what reading a file of data raises.
    """
    content = read_file(path, ".json")
    rows = []
    for line, record in content.records:
        if isinstance(record, BadRow):
            raise DataError("RA238", f"{path}, {content.counted_in} {line}: {record}.")
        absent = [name for name in names if not isinstance(record.get(name), str | int | float)]
        if absent:
            there = ", ".join(map(str, record)) or "nothing"
            raise DataError(
                "RA238",
                f"{path}, {content.counted_in} {line}: there is no text in {' and '.join(absent)}; it has {there}.",
            )
        rows.append({**record, **{name: str(record[name]) for name in names}})
    if not rows:
        raise DataError("RA239", f"{path} is empty; there is nothing to score.")
    return rows


def no_duplicates(path: Path, name: str, values: Sequence[str]) -> None:
    """Raise DataError (RA234) if two values are equal."""
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise DataError("RA234", f"{path} holds the {name} {twice[0][:80]!r} more than once; keep one of them.")


def warn_of_empty(task: str, examples: Sequence[Example]) -> list[str]:
    """Warn (RA235) of empty answers, with their number. They are scored like others."""
    empty = sum(not example.prediction.strip() for example in examples)
    if not empty:
        return []
    note = f"{empty:,} of {len(examples):,} answers are empty"
    warn("RA235", f"{task}: {note}; they are scored as they are. Look at the prompts, or at where answers stop.")
    return [note]


def is_correct(prediction: str, reference: str) -> bool:
    """Whether both end in the same number: 18, 18.0, $18 and 18 eggs are equal. Raises DataError (RA244)."""
    return extract_answer(prediction) == expected_number(reference)


def expected_number(reference: str) -> Fraction:
    """The final number of a reference. Raises DataError (RA244) if it has none."""
    number = extract_answer(reference)
    if number is None:
        raise DataError("RA244", f"the reference {reference[:80]!r} holds no number to compare with.")
    return number


def score_gsm8k(predictions: Path, references: Path) -> dict[str, int]:
    """How many predictions, in the order of the references, are correct. Warns (RA235) of those without a number.

    Raises DataError: as ``read_records`` does, RA232 different counts, RA233 a prediction for a question other than
    that of its reference, RA244 a reference without a number.
    """
    given, known = read_records(predictions, "prediction"), read_records(references, "answer")
    if len(given) != len(known):
        raise DataError(
            "RA232", f"{predictions} has {len(given):,} predictions and {references} {len(known):,} answers."
        )
    for number, (own, other) in enumerate(zip(given, known), 1):
        if own.get("question", other.get("question")) != other.get("question", own.get("question")):
            raise DataError(
                "RA233",
                f"row {number} of {predictions} and of {references} hold different questions; give both in one order.",
            )
    unanswered = sum(extract_answer(own["prediction"]) is None for own in given)
    if unanswered:
        warn("RA235", f"{unanswered:,} of {len(given):,} predictions hold no number; they count as wrong.")
    return {
        "correct": sum(is_correct(own["prediction"], other["answer"]) for own, other in zip(given, known)),
        "total": len(known),
    }


@dataclasses.dataclass(frozen=True)
class RelativeScore:
    """Percentages of the reference's score; None for an order without ratings, or with none but 0 for the reference."""

    reference_first: float | None
    system_first: float | None
    # Ratings left out because they have no score.
    failed: int

    @property
    def mean(self) -> float | None:
        """The mean of the orders that were rated."""
        rated = [score for score in (self.reference_first, self.system_first) if score is not None]
        return sum(rated) / len(rated) if rated else None

    def to_json(self) -> JsonObject:
        scores = {name: getattr(self, name) for name in ("reference_first", "system_first", "mean")}
        rounded = {name: None if score is None else round(score, DECIMALS) for name, score in scores.items()}
        return {**rounded, "failed": self.failed}


def relative_score(ratings: Sequence[Fields], reference_ids: Collection[str]) -> RelativeScore:
    """Score ``ratings``: mappings with ``answer1_id``, ``answer2_id`` and ``score``, the two ratings in that order.

    An answer whose id is in ``reference_ids`` is the reference's.
    Raises DataError: RA240 a row without one answer of each, RA239 no rating to use.
    """
    # Reference first? -> sums of the reference's and the system's ratings.
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    failed = 0
    for row in ratings:
        reference_first, pair = rating(row, reference_ids)
        failed += pair is None
        for place, mark in enumerate(pair or ()):
            sums[reference_first][place] += mark
    if failed == len(ratings):
        raise DataError("RA239", f"none of the {len(ratings):,} ratings has a score; there is nothing to compare.")
    first, second = (100 * system / reference if reference else None for reference, system in sums.values())
    return RelativeScore(first, second, failed)


def rating(row: Fields, reference_ids: Collection[str]) -> tuple[bool, tuple[float, float] | None]:
    """(Whether the reference was shown first, its rating and the system's); None for a rating that failed: absent,
    negative, above ``LARGEST_RATING`` or no pair of numbers. Raises DataError (RA240).
    """
    ids = [row.get(name) for name in ("answer1_id", "answer2_id")]
    known = [str(name) in reference_ids for name in ids]
    if None in ids or sum(known) != 1:
        raise DataError(
            "RA240",
            f"of the rated answers {ids[0]} and {ids[1]} not exactly one is among the reference answers; a row "
            "compares the reference with one system.",
        )
    pair = _pair(row.get("score"))
    return known[0], pair if known[0] or pair is None else pair[::-1]


def _pair(score: Json) -> tuple[float, float] | None:
    if not isinstance(score, Sequence) or len(score) != 2:
        return None
    marks = [float(mark) for mark in score if isinstance(mark, int | float) and 0 <= mark <= LARGEST_RATING]
    return (marks[0], marks[1]) if len(marks) == 2 else None


def score_vicuna(ratings: Sequence[Path], reference_answers: Path) -> RelativeScore:
    """The score of all files of ratings. Warns (RA241) of ratings that failed.

    Raises DataError as ``relative_score`` and ``read_records`` do, RA234 for an answer twice.
    """
    ids = [row["answer_id"] for row in read_records(reference_answers, "answer_id")]
    no_duplicates(reference_answers, "answer_id", ids)
    rows = [row for path in ratings for row in read_records(path)]
    score = relative_score(rows, set(ids))
    if score.failed:
        warn("RA241", f"{score.failed:,} of {len(rows):,} ratings have no score; they are left out, not counted as 0.")
    return score
