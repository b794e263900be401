"""Detect the layout of a source from its columns, and convert its records to rows.

``detect`` picks a ``Format`` from a record. ``rows_from_records`` turns every record into a ``Row``. It raises once for
all bad records, with their places, or leaves them out.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from rankwise.data.bad_rows import NEVER, check_bad_rows
from rankwise.data.formats import (
    FORMATS,
    PROMPT_MESSAGES,
    BadRow,
    Columns,
    Format,
    Record,
    is_number,
    pair,
    quoted,
    tools_of,
)
from rankwise.data.rows import Problem, Row, Rows, Unit, content_sha256
from rankwise.errors import ConfigError, DataError, warn

# Number of first records in which a layout is searched.
LOOKED_AT = 100


def detect(record: Record, source: str, columns: Columns, formats: Collection[Format] | None = None) -> Format:
    """The format of ``record`` among ``formats``, those of training data by default.

    Raises DataError RW207 when its columns fit none.
    """
    if any(columns):
        return _named_columns(record, source, *columns)
    known = FORMATS if formats is None else formats
    if formats is None and isinstance(record.get("prompt"), list) and "completion" in record:
        return PROMPT_MESSAGES
    found = next((layout for layout in known if layout.fits(record)), None)
    if found is not None:
        return found
    names = "; ".join(dict.fromkeys("/".join((*layout.columns, *layout.marks)) for layout in known))
    remedy = "name two of them with --prompt-column and --completion-column"
    if formats is not None:
        remedy = "rename its columns"
    elif "chosen" in record and "rejected" in record:
        remedy = "train on pairs with --objective dpo or kto"
    raise DataError(
        "RW207",
        f"{source} has the columns {quoted(record) or 'none'}, which is not a known layout ({names}); {remedy}.",
    )


def _first_layout(
    records: Sequence[Record], source: str, columns: Columns, formats: Collection[Format] | None
) -> Format | None:
    """The format of the first record that has one; None without records. Raises DataError RW207 where none has one."""
    first_error = None
    for record in records:
        try:
            return detect(record, source, columns, formats)
        except DataError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    return None


def _named_columns(record: Record, source: str, prompt: str | None, completion: str | None) -> Format:
    if not prompt or not completion:
        raise DataError("RW207", "--prompt-column and --completion-column go together; give both.")
    missing = [column for column in (prompt, completion) if column not in record]
    if missing:
        raise DataError("RW207", f"{source} has no column {quoted(missing)}; its columns are {quoted(record)}.")
    return Format(f"columns ({prompt}, {completion})", "prompt", (prompt, completion), pair(prompt, completion))


def rows_from_records(
    records: Iterable[tuple[int, Record | BadRow]],
    source: str,
    *,
    sha256: str | None = None,
    columns: Columns = (None, None),
    counted_in: Unit = "line",
    skip_bad_rows: int | None = NEVER,
    bad_before: int = 0,
    formats: Collection[Format] | None = None,
) -> Rows:
    """Rows from ``(line, record)`` pairs, in the format of the first record that has one of ``formats``.

    ``columns``: the prompt and the completion column, where the user has named them. ``counted_in``: what the line
    numbers count, for messages. Up to ``skip_bad_rows`` bad rows (None: all), less the ``bad_before`` of other files,
    are left out with a warning (RW223) if good rows remain; NEVER leaves out none and advises no option.

    Raises DataError: RW203 naming the bad rows, RW204 when there is none, RW207 for unknown columns; ConfigError: RW182
    for images.
    """
    records = list(records)
    if not records:
        raise DataError("RW204", f"{source} holds no rows; give a file with at least one example.")
    shown = [record for _, record in records if isinstance(record, Mapping)][:LOOKED_AT]
    if any(name in record for _, record in records if isinstance(record, Mapping) for name in ("images", "image")):
        raise ConfigError("RW182", f"{source} holds images, which rankwise does not read; remove their column.")
    layout = _first_layout(shown, source, columns, formats)
    rows, problems = _convert(records, source, layout, counted_in)
    check_bad_rows(problems, len(records), allowed=skip_bad_rows, before=bad_before)
    assert layout is not None, "without a record that shows the layout every row is bad"
    _tell_of_numbers([record for _, record in records], source, layout)
    # Rewards read all columns of a record.
    if rows[0].columns is None:
        _tell_of_unread([record for _, record in records], source, layout, named=any(columns))
    return Rows(
        items=rows,
        kind=layout.kind,
        source=source,
        sha256=sha256 or content_sha256(record for _, record in records),
        format=layout.name,
        uses_template=layout.uses_template,
        separator=layout.separator,
        problems=tuple(problems),
    )


def _convert(
    records: Sequence[tuple[int, Record | BadRow]], source: str, layout: Format | None, unit: Unit
) -> tuple[list[Row], list[Problem]]:
    rows, problems = [], []
    for index, (line, record) in enumerate(records):
        try:
            if isinstance(record, BadRow):
                raise record
            if layout is not None:
                fields = layout.fields(record)
                if layout.kind == "prompt" and layout.uses_template:
                    # In a row with a prompt, a column of this name may have another meaning.
                    with contextlib.suppress(BadRow):
                        fields["tools"] = tools_of(record)
                if (worse := fields.pop("rejected", None)) is not None and "tools" in fields:
                    worse["tools"] = fields["tools"]
                make = functools.partial(Row, layout.kind, source, line, counted_in=unit)
                rows.append(make(**fields, rejected=None if worse is None else make(**worse)))
        except BadRow as bad:
            problems.append(Problem(source, line, unit, bad.code, str(bad), index))
    return rows, problems


def _tell_of_numbers(records: Sequence[Record | BadRow], source: str, layout: Format) -> None:
    """Warn where numbers are read as text. In a .csv every value is text; other files may hold numbers."""
    counts = {
        column: sum(isinstance(record, Mapping) and is_number(record.get(column)) for record in records)
        for column in (*layout.columns, *layout.optional)
    }
    found = ", ".join(f"`{column}` in {count:,} of {len(records):,} rows" for column, count in counts.items() if count)
    if found:
        warn("RW224", f"{source} holds numbers ({found}); they are read as text, as a .csv would hold them.")


def _tell_of_unread(records: Sequence[Record | BadRow], source: str, layout: Format, *, named: bool) -> None:
    """Warn of columns that are not read and hold text. Numbers, single words and truth values count as notes.

    Rows of another layout are reported as bad rows instead.
    """
    read = {*layout.columns, *layout.marks, *layout.optional, *(("tools",) if layout.uses_template else ())}
    counts = Counter(
        name
        for record in records
        if isinstance(record, Mapping) and all(column in record for column in layout.columns)
        for name, value in record.items()
        if name not in read and value
        if isinstance(value, list | dict) or " " in str(value).strip()
    )
    found = ", ".join(f"`{name}` in {count:,} of {len(records):,} rows" for name, count in counts.items() if count)
    if found:
        warn(
            "RW227",
            f"{source} is read as {layout.name}, and the model does not see its other columns ({found}); if it should, "
            "write them into the columns that are read.",
        )
