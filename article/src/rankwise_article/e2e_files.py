"""Files of E2E predictions and references, read as the official scorer reads them.

A table has the columns that its header names; its lines are stripped, empty ones skipped, quotes are those of CSV,
and characters that some systems broke (``Â£``, ``Ã©``) are repaired. A text file has one prediction a line, where an
empty line is an empty prediction; references are one a line, or groups with an empty line between them. Predictions
may be JSON lines, as ``rankwise evaluate`` writes them.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from rankwise.data import kind_of
from rankwise.errors import DataError, some_of, warn
from rankwise_article.files import no_duplicates, read_records, read_text, shortened

TABLES = (".tsv", ".csv")
# Patterns for the beginning of a column's name.
CONTEXT_COLUMN = re.compile(r"mr|src|source|meaning|da|dial(ogue)?[_ .-]act", re.IGNORECASE)
PREDICTION_COLUMN = re.compile(r"out|ref|sys", re.IGNORECASE)
REFERENCE_COLUMN = re.compile(r"trg|tgt|target|ref|human", re.IGNORECASE)
REPAIRED = (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é"))


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a file, each with its line and, in a table, its meaning representation."""

    contexts: Sequence[str]
    texts: Sequence[str]
    lines: Sequence[int]


def read_e2e(predictions: Path, references: Path) -> tuple[list[str], list[Sequence[str]]]:
    """N predictions and the references of each.

    Predictions with a meaning representation get the references of the same one; others are taken in order.
    Raises DataError: RA230 a file cannot be read, RA231 a table without the columns, RA238 bad JSON lines, RA232
    different counts, RA233 no references for a prediction, RA234 a meaning representation twice, RA239 an empty file.
    """
    given, known = read_predictions(predictions), read_references(references)
    for path, items in ((predictions, given.texts), (references, known)):
        if not items:
            raise DataError("RA239", f"{path} is empty; there is nothing to score.")
    empty = [line for line, text in zip(given.lines, given.texts) if not text.strip()]
    if empty:
        warn(
            "RA235",
            f"{predictions}: {len(empty):,} of {len(given.texts):,} predictions are empty (lines "
            f"{some_of(map(str, empty), 3)}); they are scored as they are.",
        )
    if given.contexts:
        no_duplicates(predictions, "meaning representation", given.contexts, given.lines)
        missing = [(line, text) for line, text in zip(given.lines, given.contexts) if text not in known]
        if missing:
            raise DataError(
                "RA233",
                f"{references} has no reference for {len(missing):,} of {len(given.texts):,} meaning representations "
                f"of {predictions}; the first is in line {missing[0][0]}: {shortened(missing[0][1])}.",
            )
    if len(given.texts) != len(known):
        raise DataError(
            "RA232",
            f"{predictions} has {len(given.texts):,} predictions and {references} {len(known):,} groups of references; "
            "give one prediction of each.",
        )
    groups = [known[context] for context in given.contexts] if given.contexts else list(known.values())
    return list(given.texts), groups


def read_predictions(path: Path) -> Texts:
    """One text per meaning representation from a table, JSON lines or plain lines."""
    kind = kind_of(path)
    if kind in TABLES:
        return _from_table(path, PREDICTION_COLUMN)
    if kind == ".jsonl":
        records = read_records(path)
        return Texts([], [record.text(path, "prediction") for record in records], [record.line for record in records])
    lines = [line.strip() for line in read_text(path).splitlines()]
    return Texts([], lines, range(1, len(lines) + 1))


def read_references(path: Path) -> dict[str, Sequence[str]]:
    """{meaning representation: its references} in the order of the file; without a table, the number of the group."""
    found: dict[str, list[str]] = {}
    if kind_of(path) in TABLES:
        table = _from_table(path, REFERENCE_COLUMN)
        for context, text in zip(table.contexts, table.texts):
            found.setdefault(context, []).append(text)
        return {**found}
    text = "\n".join(line.strip() for line in read_text(path).splitlines()).strip()
    groups = [group.split("\n") for group in re.split(r"\n{2,}", text) if group]
    if len(groups) == 1:
        groups = [[line] for line in groups[0]]
    return {str(number): group for number, group in enumerate(groups)}


def _from_table(path: Path, column: re.Pattern[str]) -> Texts:
    text = read_text(path)
    for broken, right in REPAIRED:
        text = text.replace(broken, right)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    reader = csv.reader((line for _, line in lines), delimiter="\t" if lines and "\t" in lines[0][1] else ",")
    try:
        rows = [(lines[reader.line_num - 1][0], row) for row in reader]
    except csv.Error as error:
        raise DataError("RA231", f"{path} cannot be read as a table: {error}.") from None
    if not rows:
        return Texts([], [], [])
    (_, names), *body = rows
    places = [index for pattern in (CONTEXT_COLUMN, column) for index, name in enumerate(names) if pattern.match(name)]
    if len(places) != 2:
        raise DataError(
            "RA231",
            f"{path}: the columns {', '.join(map(shortened, names))} are not one with the meaning representation and "
            "one with the text; name them `mr` and `output` (predictions) or `ref` (references).",
        )
    # Lines are stripped at their end, which removes the separator before an empty last column.
    body = [(line, [*row, ""] if len(row) == len(names) - 1 else row) for line, row in body]
    wrong = [str(line) for line, row in body if len(row) != len(names)]
    if wrong:
        raise DataError(
            "RA231",
            f"{path}: line {some_of(wrong, 3)} has other than the {len(names)} columns of the first; look for a tab, "
            "comma or quote too many.",
        )
    context, value = places
    return Texts([row[context] for _, row in body], [row[value] for _, row in body], [line for line, _ in body])
