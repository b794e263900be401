"""Do the evaluation rows occur in the training rows?"""

from __future__ import annotations

from rankwise.data.rows import Row, Rows


def overlapping_rows(train: Rows, evaluation: Rows) -> int:
    """How many rows of ``evaluation`` have the same text as a row of ``train``, case and white space aside."""
    seen = {_normalised(row) for row in train}
    return sum(_normalised(row) in seen for row in evaluation)


def _normalised(row: Row) -> str:
    return " ".join(row.content().casefold().split())
