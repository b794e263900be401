"""GSM8K: the final number of a solution, and whether it is correct (Cobbe et al. 2021)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from rankwise.errors import DataError, warn
from rankwise.evaluation.metrics.files import Record, listed, no_duplicates, read_records, shortened

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
# A number without its sign; 3/4 is one number.
PATTERN = re.compile(rf"(?:{DIGITS})(?:\s?/\s?(?:{DIGITS}))?")
SIGN = re.compile(r"(?P<left>\S?)(?P<gap>\s*)[$£€]?[-\u2212\u2013](?P<space>\s?)[$£€]?\s?$")
# Characters before a number in which its sign may stand.
SIGN_REACH = 12
# Characters. A model that repeats a digit writes longer ones, and a fraction of millions of digits takes minutes.
LONGEST_NUMBER = 1000
# A solution behind ``A:`` that goes on to say what the answer is counts by that.
ANSWER = r"\bfinal answer\b|\banswer\s*(?:is|:|=)"
MARKERS = (
    re.compile(r"####(?P<rest>[^\n]*)"),
    re.compile(r"\\boxed\s*\{(?P<rest>[^{}\n]*)"),
    re.compile(rf"(?im:{ANSWER}|^\s*A:(?![^\n]*(?:{ANSWER})))(?P<rest>[^\n]*)"),
)
# Notes for a calculator in GSM8K's own solutions: 48/2 = <<48/2=24>>24.
CALCULATOR = re.compile(r"<<[^<>\n]*>>")


@dataclasses.dataclass(frozen=True)
class Gsm8kScores:
    """Which of N predictions end with the correct number."""

    right: tuple[bool, ...]
    unanswered: int
    # Predictions without any number.

    @property
    def correct(self) -> int:
        return sum(self.right)

    @property
    def total(self) -> int:
        return len(self.right)

    def to_json(self) -> dict[str, int]:
        return {"correct": self.correct, "total": self.total}


def extract_answer(text: str) -> Fraction | None:
    r"""The final number of ``text``, or None.

    The first rule that matches: after ``####``; in ``\boxed{}``; after ``answer is``, ``answer:`` or ``A:``, where the
    number after the line's last equals sign counts; the last number of all. Commas, currency signs, units and a full
    stop are not part of it.
    """
    text = CALCULATOR.sub("", text)
    for marker in MARKERS:
        for found in marker.finditer(text):
            number = _first_number(found["rest"])
            if number is not None:
                return number
    numbers = list(PATTERN.finditer(text))
    return _value(numbers[-1]) if numbers else None


def is_correct(prediction: str, reference: str) -> bool:
    """Whether both end in the same number: 18, 18.0, $18 and 18 eggs are equal. Raises DataError (RW244)."""
    expected = extract_answer(reference)
    if expected is None:
        raise DataError("RW244", f"the reference {shortened(reference)} holds no number to compare with.")
    return extract_answer(prediction) == expected


def score_gsm8k(predictions: Sequence[str], references: Sequence[str]) -> Gsm8kScores:
    """Score N predictions against N references. Raises DataError: RW232 different counts, RW244 no number."""
    if len(predictions) != len(references):
        raise DataError("RW232", f"there are {len(predictions):,} predictions and {len(references):,} references.")
    right = tuple(is_correct(prediction, reference) for prediction, reference in zip(predictions, references))
    return Gsm8kScores(right, sum(extract_answer(prediction) is None for prediction in predictions))


def read_gsm8k(predictions: Path, references: Path) -> tuple[list[str], list[str]]:
    """The texts of two files, joined by ``question`` where both have it, else in the order they stand in.

    Raises DataError: RW230, RW238 a file cannot be read, RW232 different counts, RW233 a question without a
    reference, RW234 a question or an `id` twice, RW239 nothing to score.
    """
    given, known = read_records(predictions), read_records(references)
    if not given:
        raise DataError("RW239", f"{predictions} holds no predictions; write one JSON object a line.")
    for path, rows in ((predictions, given), (references, known)):
        named = [row for row in rows if row.fields.get("id") is not None]
        no_duplicates(path, "id", [str(row.fields["id"]) for row in named], [row.line for row in named])
    pairs = _joined(predictions, given, references, known)
    texts = [record.text(predictions, "prediction") for record, _ in pairs]
    empty = sum(not text.strip() for text in texts)
    if empty:
        warn("RW235", f"{empty:,} of {len(texts):,} predictions are empty; they count as wrong.")
    return texts, [record.text(references, "answer") for _, record in pairs]


def _joined(
    predictions: Path, given: Sequence[Record], references: Path, known: Sequence[Record]
) -> list[tuple[Record, Record]]:
    asked, answered = (_questions(rows) for rows in (given, known))
    if asked is None or answered is None or asked == answered:
        _same_count(predictions, given, references, known)
        return list(zip(given, known))
    for path, questions, rows in ((predictions, asked, given), (references, answered, known)):
        no_duplicates(path, "question", questions, [row.line for row in rows])
    place = dict(zip(answered, known))
    strange = [row for row, question in zip(given, asked) if question not in place]
    if strange:
        lines = listed([row.line for row in strange])
        raise DataError(
            "RW233",
            f"{predictions}: {references} has no answer to the questions of lines {lines}; "
            "give the references of the same questions.",
        )
    if len(given) != len(known):
        missing = next(row for row, question in zip(known, answered) if question not in set(asked))
        raise DataError(
            "RW232",
            f"{predictions} has {len(given):,} predictions and {references} {len(known):,} answers; the first question "
            f"without a prediction stands in line {missing.line}: {shortened(missing.text(references, 'question'))}.",
        )
    return [(row, place[question]) for row, question in zip(given, asked)]


def _questions(rows: Sequence[Record]) -> list[str] | None:
    """The questions of all rows, or None where one has none."""
    if not all(isinstance(row.fields.get("question"), str) for row in rows):
        return None
    return [row.fields["question"].strip() for row in rows]


def _same_count(predictions: Path, given: Sequence[Record], references: Path, known: Sequence[Record]) -> None:
    if len(given) != len(known):
        path, rows = (predictions, given) if len(given) > len(known) else (references, known)
        first = rows[min(len(given), len(known))].line
        raise DataError(
            "RW232",
            f"{predictions} has {len(given):,} predictions and {references} {len(known):,} answers; "
            f"line {first} of {path} is the first without a counterpart.",
        )


def _first_number(rest: str) -> Fraction | None:
    """The first number behind the last equals sign, or of the whole text where none stands there."""
    found = PATTERN.search(rest.rpartition("=")[2]) or PATTERN.search(rest)
    return _value(found) if found else None


def _value(found: re.Match[str]) -> Fraction | None:
    """The number matched, with its sign; None for a division by zero, and for one that is too long to be an answer."""
    if len(found[0]) > LONGEST_NUMBER:
        return None
    top, _, bottom = re.sub(r"[^\d./]", "", found[0]).partition("/")
    divisor = Fraction(Decimal(bottom)) if bottom else Fraction(1)
    if not divisor:
        return None
    value = Fraction(Decimal(top)) / divisor
    return -value if _is_negative(found.string[max(0, found.start() - SIGN_REACH) : found.start()]) else value


def _is_negative(before: str) -> bool:
    """Whether the minus at the end of ``before`` is a sign. In ``16 - 3``, ``20-30`` and ``covid-19`` it is not."""
    sign = SIGN.search(before)
    if sign is None or sign["left"].isdigit() or sign["left"] in tuple(")%"):
        return False
    if sign["space"]:
        return sign["left"] in tuple("=:(#*{") or not before[: sign.start("left") + 1].strip()
    return bool(sign["gap"]) or not sign["left"].isalnum()
