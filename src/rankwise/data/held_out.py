"""The rows to evaluate on: limit their number, and find those that are also training rows."""

from __future__ import annotations

import dataclasses

from rankwise.data.rows import Row, Rows
from rankwise.errors import warn

EVAL_ROWS = 256
NAMED_ROWS = 5


def limited(rows: Rows, limit: int | None) -> Rows:
    """The first ``limit`` rows (all for 0); by default EVAL_ROWS spread evenly, because files are often sorted."""
    if limit is not None:
        return rows[:limit] if limit else rows
    if len(rows) <= EVAL_ROWS:
        return rows
    warn(
        "RW528",
        f"each evaluation takes {EVAL_ROWS} of the {len(rows):,} rows of {rows.source}, spread evenly; --eval-limit 0 "
        "takes all.",
    )
    chosen = [rows.items[number * len(rows) // EVAL_ROWS] for number in range(EVAL_ROWS)]
    return dataclasses.replace(rows, items=chosen)


def warn_of_overlap(train: Rows, evaluation: Rows) -> int:
    """Count the rows of ``evaluation`` that are also in ``train``, and name them in a warning (RW218)."""
    twins = overlapping_rows(train, evaluation)
    if twins:
        named = "; ".join(f"{row.place} is {twin.place}" for row, twin in twins[:NAMED_ROWS])
        more = f"; and {len(twins) - NAMED_ROWS} more" if len(twins) > NAMED_ROWS else ""
        warn(
            "RW218",
            f"{len(twins)} of {len(evaluation)} evaluation rows are also in the training data, word for word "
            f"({named}{more}); their loss says nothing about new text.",
            stacklevel=3,
        )
    return len(twins)


def overlapping_rows(train: Rows, evaluation: Rows) -> list[tuple[Row, Row]]:
    """Pairs of an evaluation row and the first training row with the same text. Case and white space are ignored."""
    seen: dict[str, Row] = {}
    for row in train:
        seen.setdefault(_normalised(row), row)
    pairs = ((row, seen.get(_normalised(row))) for row in evaluation)
    return [(row, twin) for row, twin in pairs if twin is not None]


def _normalised(row: Row) -> str:
    return " ".join(row.content().casefold().split())
