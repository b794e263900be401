"""The Vicuna benchmark: a judge's ratings of two systems as a percentage of the reference's (Dettmers et al. 2023).

    score = 100 sum_q s_q / sum_q r_q        s: the system's ratings, r: the reference's, over questions q

taken once with the reference's answer shown first and once with the system's, since judges favour the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from rankwise.errors import DataError, warn
from rankwise.foreign import Fields, Json, JsonObject
from rankwise_article.files import no_duplicates, read_records

DECIMALS = 2
# Judges are asked for 1 to 10, and a file may hold any scale from 0. Numbers near the largest float would add up to
# infinity.
LARGEST_RATING = 1e6
# Score of a failed rating.
FAILED = (-1.0, -1.0)


@dataclasses.dataclass(frozen=True)
class RelativeScore:
    """Percentages of the reference's score; None for an order without ratings, or with none but 0 for the reference."""

    reference_first: float | None
    system_first: float | None
    # Ratings left out because they have no score.
    failed: int
    # Ratings used.
    count: int

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

    An answer whose id is in ``reference_ids`` is the reference's. A score that is absent, negative, above
    ``LARGEST_RATING`` or no pair of numbers is a failed rating.
    Raises DataError: RA240 a row without one answer of each, RA242 no rating to use.
    """
    # Reference first? -> sums of the reference's and the system's ratings.
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    failed = 0
    for number, row in enumerate(ratings, 1):
        reference_first = _reference_first(number, row, reference_ids)
        pair = score_pair(row.get("score"))
        if pair is None:
            failed += 1
            continue
        reference, system = pair if reference_first else pair[::-1]
        sums[reference_first][0] += reference
        sums[reference_first][1] += system
    if failed == len(ratings):
        raise DataError("RA242", f"none of the {len(ratings):,} ratings has a score; there is nothing to compare.")
    return RelativeScore(_percent(*sums[True]), _percent(*sums[False]), failed, len(ratings) - failed)


def _percent(reference: float, system: float) -> float | None:
    return 100.0 * system / reference if reference else None


def score_pair(score: Json) -> tuple[float, float] | None:
    """Two ratings from 0 to ``LARGEST_RATING``, or None for a failed rating."""
    if not isinstance(score, Sequence) or len(score) != 2:
        return None
    numbers = [item for item in score if isinstance(item, int | float) and not isinstance(item, bool)]
    ratings = [float(number) for number in numbers if 0 <= number <= LARGEST_RATING]
    return (ratings[0], ratings[1]) if len(ratings) == 2 else None


def _reference_first(number: int, row: Fields, reference_ids: Collection[str]) -> bool:
    ids = [row.get("answer1_id"), row.get("answer2_id")]
    known = [str(name) in reference_ids for name in ids]
    if None in ids or sum(known) != 1:
        raise DataError(
            "RA240",
            f"rating {number}: of the answers {ids[0]} and {ids[1]} not exactly one is among the reference answers; "
            "a row compares the reference with one system.",
        )
    return known[0]


def read_vicuna(ratings: Sequence[Path], reference_answers: Path) -> tuple[list[Fields], set[str]]:
    """Rating rows of all files, and the ids of the reference's answers.

    Raises DataError: RA230, RA238 a file cannot be read, RA234 an answer twice, RA239 an empty file.
    """
    answers = read_records(reference_answers)
    ids = [record.text(reference_answers, "answer_id") for record in answers]
    no_duplicates(reference_answers, "answer_id", ids, [record.line for record in answers])
    rows = [record for path in ratings for record in read_records(path)]
    names = ", ".join(map(str, ratings))
    if not rows or not ids:
        raise DataError("RA239", f"{names if ids else reference_answers} is empty; there is nothing to score.")
    return [record.fields for record in rows], set(ids)


def warn_of_failed(score: RelativeScore) -> None:
    """Say how many ratings were left out."""
    if score.failed:
        total = score.failed + score.count
        warn("RA241", f"{score.failed:,} of {total:,} ratings have no score; they are left out, not counted as zero.")
