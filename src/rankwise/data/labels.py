"""Texts with labels: their layouts, the labels of a data set, and their encoding to token ids."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING

from rankwise.data.encoding import Counts, Encoded
from rankwise.data.formats import BadRow, Format, Record, encodable, found_in, is_number, text_field
from rankwise.data.rows import NEVER, Problem, Rows, check_bad_rows
from rankwise.errors import DataError, some_of, warn
from rankwise.foreign import JsonObject
from rankwise.labels import NUMBER, SEVERAL, SINGLE, Labels, Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = {tuple: "a list", str: "text", int: "a number", float: "a number"}


def _target(record: Record) -> Target:
    value = record.get("label")
    if isinstance(value, list) and all(isinstance(name, str | int) for name in value):
        return tuple(_name(name) for name in value)
    if is_number(value):
        return float(value) if isinstance(value, Decimal) else value
    if isinstance(value, bool) or (isinstance(value, str) and value.strip()):
        return encodable(_name(value), "`label`")
    raise BadRow(f"expected a label in `label`, found {found_in(record, 'label')}")


def _name(value: str | int) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _texts(record: Record) -> JsonObject:
    """The fields of a row; a second text is in ``completion``."""
    pair = {"completion": text_field(record, "text_pair")} if record.get("text_pair") else {}
    return {"text": text_field(record, "text"), **pair}


def _labelled(record: Record) -> JsonObject:
    return {**_texts(record), "target": _target(record)}


def _perhaps_labelled(record: Record) -> JsonObject:
    return _labelled(record) if record.get("label") not in (None, "") else _texts(record)


LABELLED = (
    Format(
        "text with a label (text, label)", "text", ("text",), _labelled, False, "", ("text_pair",), marks=("label",)
    ),
)
# Texts to be answered, whose labels, if there are any, are compared with the answers.
UNANSWERED = (Format("text (text)", "text", ("text",), _perhaps_labelled, False, "", ("text_pair", "label")),)


def labels_in(rows: Rows) -> Labels:
    """The labels of training rows: names and whole numbers sorted, so that the order of rows does not matter; a number
    where some label is a fraction; several where labels are lists.

    Raises DataError: RW203 for labels of several types, RW214 if all rows have the same one.
    """
    targets = [row.target for row in rows if row.target is not None]
    kinds = Counter(KINDS[type(target)] for target in targets)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} in {count:,} row{'s' * (count > 1)}" for kind, count in kinds.items())
        raise DataError("RW203", f"{rows.source} has labels of several types ({found}); write all as one type.")
    if any(isinstance(target, float) for target in targets):
        return Labels(("value",), NUMBER)
    lists = [target for target in targets if isinstance(target, tuple)]
    names = sorted({name for target in lists for name in target}) if lists else map(str, sorted(set(targets)))
    labels = Labels(tuple(names), SEVERAL if lists else SINGLE)
    if len(set(targets)) < 2:
        raise DataError(
            "RW214",
            f"all {len(rows)} rows of {rows.source} have the same label ({targets[0]!r}), so there is nothing to "
            "learn; give rows with other labels, too.",
        )
    return labels


def label_counts(rows: Rows, labels: Labels) -> dict[str, int]:
    """{label: number of rows}, the most frequent first; empty for numbers."""
    if labels.problem == NUMBER:
        return {}
    each = (row.target if isinstance(row.target, tuple) else (str(row.target),) for row in rows)
    return dict(Counter(name for names in each for name in names).most_common())


def encode_labelled(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    *,
    max_length: int,
    name: str = "train",
    skip_bad_rows: int | None = NEVER,
) -> Encoded:
    """Token ids as the tokenizer gives them, special tokens included, and ``label``, None if a row has none.

    Raises DataError (RW203) for labels that are not among ``labels``. Warns of rows that were cut (RW215).
    """
    import datasets

    problems, counts, columns = unknown_labels(rows, labels), Counts(), []
    unknown = {problem.place for problem in problems}
    for row in rows:
        if row.place in unknown:
            continue
        label = None if row.target is None else labels.number(row.target)
        pair = row.completion or None
        encoded = tokenizer(row.text, pair, truncation=True, max_length=max_length)
        ids, length = encoded["input_ids"], len(encoded["input_ids"])
        if length == max_length:
            length = len(tokenizer(row.text, pair, verbose=False)["input_ids"])
        kinds = {"token_type_ids": encoded["token_type_ids"]} if "token_type_ids" in encoded else {}
        columns.append({"input_ids": ids, **kinds, "label": label})
        counts.lengths.append(length)
    check_bad_rows(problems, len(rows), allowed=skip_bad_rows, before=len(rows.problems))
    counts.trained, counts.truncated = len(columns), sum(length > max_length for length in counts.lengths)
    if counts.truncated:
        warn(
            "RW215",
            f"{counts.truncated} of {len(rows)} rows of {rows.source} were cut at --max-length {max_length} and lost "
            f"their end (the longest has {max(counts.lengths):,} tokens).",
            stacklevel=3,
        )
    problems = [*rows.problems, *problems]
    tokens = sum(len(row["input_ids"]) for row in columns)
    report = counts.report(name, "no template: the text as it is", problems, rows=len(columns), tokens=tokens)
    return Encoded(datasets.Dataset.from_list(columns), report)


def unknown_labels(rows: Rows, labels: Labels) -> list[Problem]:
    """The rows whose label is not among ``labels``."""
    found = []
    for row in rows:
        try:
            if row.target is not None:
                labels.number(row.target)
        except ValueError:
            why = f"expected one of the known labels ({some_of(labels.names)}), found {row.target!r}"
            found.append(Problem(row.source, row.line, row.counted_in, "RW203", why))
    return found
