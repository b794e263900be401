"""Files of E2E predictions and references, read as the official scorer reads them.

A table has the columns that its header names; its lines are stripped, empty ones skipped, quotes are those of CSV,
and characters that some systems broke (``Â£``, ``Ã©``) are repaired. A text file has one prediction a line, where an
empty line is an empty prediction; references are one a line with an empty line between groups, or
``context||reference`` as in the LoRA repository. JSON lines are read too.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rankwise.data import kind_of
from rankwise.errors import DataError, some_of, warn
from rankwise_article.files import no_duplicates, read_records, read_text, shortened

JSON_SUFFIXES = (".jsonl", ".json")
TABLE_SUFFIXES = (".tsv", ".csv")
# Patterns for the beginning of a column's name.
CONTEXT_COLUMN = re.compile(r"mr|src|source|meaning|da|dial(ogue)?[_ .-]act", re.IGNORECASE)
PREDICTION_COLUMN = re.compile(r"out|ref|sys", re.IGNORECASE)
REFERENCE_COLUMN = re.compile(r"trg|tgt|target|ref|human", re.IGNORECASE)
CONTEXT_FIELDS = ("mr", "MR", "meaning_representation", "context", "source", "src")
PREDICTION_FIELDS = ("prediction", "output", "generation", "text")
REFERENCE_FIELDS = ("references", "ref", "reference", "completion", "target")
MENDED = (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é"))
SEPARATOR = "||"
LONGEST_FIELD = 1 << 30
# Attributes with other names in the LoRA repository's files.
RENAMED = (("eattype", "type"), ("pricerange", "price"))


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a file, each with its line and, if the file has one, its meaning representation."""

    path: Path
    contexts: Sequence[str | None]
    texts: Sequence[str]
    lines: Sequence[int]

    @property
    def has_contexts(self) -> bool:
        return any(self.contexts)


@dataclasses.dataclass(frozen=True)
class Groups:
    """References by meaning representation."""

    path: Path
    contexts: Sequence[str | None]
    references: Sequence[Sequence[str]]
    lines: Sequence[int]


def read_e2e(predictions: Path, references: Path) -> tuple[list[str], list[Sequence[str]]]:
    """N predictions and the references of each.

    Predictions with a meaning representation get the references of the same one; others are taken in order.
    Raises DataError: RA230 a file cannot be read, RA231 a table without the columns, RA238 bad JSON lines, RA232
    different counts, RA233 no references for a prediction, RA234 a meaning representation twice, RA239 an empty file.
    """
    given = read_predictions(predictions)
    known = read_references(references, by_context=given.has_contexts)
    for path, items in ((predictions, given.texts), (references, known.references)):
        if not items:
            raise DataError("RA239", f"{path} is empty; there is nothing to score.")
    empty = [line for line, text in zip(given.lines, given.texts) if not text.strip()]
    if empty:
        warn(
            "RA235",
            f"{predictions}: {len(empty):,} of {len(given.texts):,} predictions are empty (lines "
            f"{some_of(map(str, empty), 3)}); they are scored as they are.",
        )
    if given.has_contexts and any(known.contexts):
        return list(given.texts), _joined(given, known)
    _same_count(given, known)
    return list(given.texts), list(known.references)


def read_predictions(path: Path) -> Texts:
    """One text per meaning representation from TSV, CSV, JSON lines or plain lines."""
    kind = kind_of(path)
    if kind in JSON_SUFFIXES:
        return _from_records(path, PREDICTION_FIELDS)
    text = read_text(path)
    if kind in TABLE_SUFFIXES or _has_header(text):
        return _from_table(path, text, PREDICTION_COLUMN)
    lines = [line.strip() for line in text.splitlines()]
    return Texts(path, [None] * len(lines), lines, range(1, len(lines) + 1))


def read_references(path: Path, *, by_context: bool) -> Groups:
    """References by meaning representation: all that share one, or with ``by_context=False`` those in a row."""
    kind = kind_of(path)
    if kind in JSON_SUFFIXES:
        return _reference_records(path, by_context)
    text = read_text(path)
    if kind in TABLE_SUFFIXES:
        return _grouped(_from_table(path, text, REFERENCE_COLUMN), by_context)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    filled = [(number, line) for number, line in lines if line]
    if filled and all(SEPARATOR in line for _, line in filled):
        pairs = [line.partition(SEPARATOR) for _, line in filled]
        contexts, texts = [pair[0].strip() for pair in pairs], [pair[2].strip() for pair in pairs]
        return _grouped(Texts(path, contexts, texts, [number for number, _ in filled]), by_context)
    return _blank_separated(path, lines)


def _blank_separated(path: Path, lines: Sequence[tuple[int, str]]) -> Groups:
    """An empty line ends a group; a file without one has a reference a line."""
    groups: list[list[str]] = [[]]
    starts = [1]
    for number, line in lines:
        if line:
            groups[-1].append(line)
        else:
            groups.append([])
            starts.append(number + 1)
    if not groups[-1]:
        groups.pop()
    if len(groups) == 1:
        groups, starts = [[line] for line in groups[0]], list(range(1, len(groups[0]) + 1))
    return Groups(path, [None] * len(groups), groups, starts[: len(groups)])


def _grouped(texts: Texts, by_context: bool) -> Groups:
    groups: list[list[str]] = []
    contexts: list[str | None] = []
    lines: list[int] = []
    place: dict[str | None, int] = {}
    for context, text, line in zip(texts.contexts, texts.texts, texts.lines):
        follows = bool(contexts) and contexts[-1] == context
        if (context not in place) if by_context else not follows:
            place[context] = len(groups)
            groups.append([])
            contexts.append(context)
            lines.append(line)
        groups[place[context]].append(text)
    return Groups(texts.path, contexts, groups, lines)


def _from_records(path: Path, fields: Sequence[str]) -> Texts:
    records = read_records(path)
    texts = [record.text(path, *fields) for record in records]
    contexts: list[str | None] = [None] * len(records)
    for names in (CONTEXT_FIELDS, ("prompt",)):
        if any(name in record.fields for record in records for name in names):
            contexts = [record.text(path, *names).strip() for record in records]
            break
    ids = [record.fields["id"] for record in records if record.fields.get("id") is not None]
    if len(ids) == len(records):
        no_duplicates(path, "id", [str(name) for name in ids], [record.line for record in records])
    return Texts(path, contexts, texts, [record.line for record in records])


def _reference_records(path: Path, by_context: bool) -> Groups:
    """A line holds one reference, or with ``references`` all of a meaning representation."""
    records = read_records(path)
    if not any(isinstance(record.fields.get("references"), list) for record in records):
        return _grouped(_from_records(path, REFERENCE_FIELDS), by_context)
    groups = []
    for record in records:
        group = record.fields.get("references")
        if not isinstance(group, list) or not group or not all(isinstance(text, str) for text in group):
            raise DataError("RA238", f"{path}, line {record.line}: references should be a list of texts.")
        groups.append(group)
    names = [next((name for name in (*CONTEXT_FIELDS, "prompt") if name in record.fields), None) for record in records]
    contexts = [record.text(path, name).strip() if name else None for record, name in zip(records, names)]
    return Groups(path, contexts, groups, [record.line for record in records])


def _has_header(text: str) -> bool:
    """Whether a text file is really a table: its first line names both columns, separated by a tab."""
    first, tab, second = text.partition("\n")[0].strip().partition("\t")
    return bool(tab and CONTEXT_COLUMN.fullmatch(first) and PREDICTION_COLUMN.match(second))


def _from_table(path: Path, text: str, column: re.Pattern[str]) -> Texts:
    rows = list(_rows(path, text))
    if not rows:
        return Texts(path, [], [], [])
    width = len(rows[0][1])
    context, value, start = _columns(path, rows[0][1], column)
    if value == width - 1:
        # Lines are stripped at their end, which removes the separator before an empty last column.
        rows = [(line, [*row, ""] if len(row) == width - 1 and context < len(row) else row) for line, row in rows]
    wrong = [line for line, row in rows if len(row) != width]
    if wrong:
        raise DataError(
            "RA231",
            f"{path}: line {some_of(map(str, wrong), 3)} has other than the {width} columns of the first; "
            "look for a tab, comma or quote too many.",
        )
    body = rows[start:]
    return Texts(path, [row[context] for _, row in body], [row[value] for _, row in body], [line for line, _ in body])


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table with the line each ends in."""
    for broken, right in MENDED:
        text = text.replace(broken, right)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        delimiter = "\t" if lines and "\t" in lines[0][1] else ","
        reader = csv.reader((line for _, line in lines), delimiter=delimiter)
        for row in reader:
            yield lines[reader.line_num - 1][0], row
    except csv.Error as error:
        raise DataError("RA231", f"{path} cannot be read as a table: {error}.") from None
    finally:
        csv.field_size_limit(before)


def _columns(path: Path, first: Sequence[str], column: re.Pattern[str]) -> tuple[int, int, int]:
    """Columns of the context and of the text, and the first row of data."""
    contexts = [index for index, name in enumerate(first) if CONTEXT_COLUMN.match(name)]
    values = [index for index, name in enumerate(first) if column.match(name)]
    if len(contexts) == len(values) == 1:
        return contexts[0], values[0], 1
    if len(first) == 2 and (not contexts + values or "[" in first[0]):
        return 0, 1, 0
    raise DataError(
        "RA231",
        f"{path}: the columns {', '.join(map(shortened, first))} are not one with the meaning representation and one "
        "with the text; name them `mr` and `output` (predictions) or `ref` (references).",
    )


def _joined(given: Texts, known: Groups) -> list[Sequence[str]]:
    """The references of each prediction, by meaning representation."""
    contexts = [context or "" for context in given.contexts]
    no_duplicates(given.path, "meaning representation", contexts, given.lines)
    place = {context: index for index, context in enumerate(known.contexts)}
    order = [place.get(context) for context in contexts]
    if None in order:
        # The LoRA repository writes meaning representations with other case, names and punctuation.
        loose = {_loosened(context or ""): index for index, context in enumerate(known.contexts)}
        if len(loose) == len(known.contexts):
            order = [loose.get(_loosened(context)) for context in contexts]
    missing = [index for index, found in enumerate(order) if found is None]
    if missing:
        raise DataError(
            "RA233",
            f"{known.path} has no reference for {len(missing):,} of {len(contexts):,} meaning representations of "
            f"{given.path}; the first is in line {given.lines[missing[0]]}: {shortened(contexts[missing[0]])}.",
        )
    if len(order) != len(known.references):
        answered = set(order)
        first = next(index for index in range(len(known.references)) if index not in answered)
        raise DataError(
            "RA232",
            f"{given.path} has {len(order):,} predictions and {known.path} {len(known.references):,} meaning "
            f"representations; the first without a prediction is in line {known.lines[first]}: "
            f"{shortened(known.contexts[first] or '')}.",
        )
    return [known.references[index] for index in order if index is not None]


def _loosened(context: str) -> str:
    """A meaning representation without what varies in writing it: case, names, punctuation."""
    text = re.sub(r"[\W_]+", "", context.casefold())
    for name, other in RENAMED:
        text = text.replace(name, other)
    return text


def _same_count(given: Texts, known: Groups) -> None:
    mine, theirs = len(given.texts), len(known.references)
    if mine == theirs:
        return
    path, lines = (given.path, given.lines) if mine > theirs else (known.path, known.lines)
    raise DataError(
        "RA232",
        f"{given.path} has {mine:,} predictions and {known.path} {theirs:,} groups of references; number "
        f"{min(mine, theirs) + 1} (line {lines[min(mine, theirs)]} of {path}) is the first without a counterpart.",
    )
