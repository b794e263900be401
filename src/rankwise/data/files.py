"""Read one file into ``(line, record)`` pairs: JSON lines, JSON, CSV, TSV, parquet or text, plain or gzipped."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.data.formats import BadRow, Record
from rankwise.data.rows import Unit
from rankwise.errors import DataError, one_line
from rankwise.foreign import Json, parse_json

if TYPE_CHECKING:
    import pyarrow

Numbered = Iterator[tuple[int, Record | BadRow]]
# The csv module's own limit of 128 KiB is too short for documents in a table.
LONGEST_FIELD_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class FileContent:
    """A parsed file."""

    records: Sequence[tuple[int, Record | BadRow]]
    sha256: str
    # The unit of the numbers in ``records``: lines, rows, ...
    counted_in: Unit = "line"


def kind_of(path: Path) -> str | None:
    """The extension that decides how ``path`` is read, without ``.gz``; None for an unknown kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def read_file(path: Path, kind: str | None = None) -> FileContent:
    """All records of ``path``, each with its first line, or with its number in JSON arrays and parquet.

    ``kind`` overrides the extension of ``path``.

    Raises DataError: RW201 cannot be opened, RW202 unknown extension, RW205 not UTF-8, RW206 damaged.
    """
    kind = kind or kind_of(path)
    if kind is None:
        found = path.suffix or "no extension"
        kinds = ", ".join(KINDS)
        raise DataError("RW202", f"cannot read {path}: {found} is not a kind of data file; give {kinds} (also .gz).")
    stored = _stored(path)
    content = _unpacked(path, stored)
    records = list(KINDS[kind](path, content))
    # Arrays are often written without line breaks, so their records are counted by number.
    is_array = kind == ".json" and content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    unit: Unit = "row" if is_array or kind == ".parquet" else "line"
    return FileContent(records, hashlib.sha256(stored).hexdigest(), unit)


def read_text(path: Path) -> str:
    """The text of a file, gzipped or not, without a byte order mark. Raises DataError RW201, RW205, RW206."""
    return _decoded(path, _unpacked(path, _stored(path)))


def _stored(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError("RW201", f"cannot open {path}: {error.strerror or error}.") from None


def _unpacked(path: Path, stored: bytes) -> bytes:
    if path.suffix.lower() != ".gz":
        return stored
    try:
        return gzip.decompress(stored)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("RW206", f"cannot unpack {path}: it is cut short or no gzip file ({error}).") from None


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            "RW205",
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}; convert it, from Latin-1 for "
            f"example with `iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}`.",
        ) from None


def _json_lines(path: Path, content: bytes) -> Numbered:
    text = _decoded(path, content)
    if text.lstrip()[:1] == "[":
        raise DataError("RW206", f"{path} holds a JSON array and not one object a line; name it .json.")
    for number, line in _lines(text):
        yield number, _json_record(line)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of each line that is not blank."""
    return ((number, line.rstrip("\r\n")) for number, line in enumerate(io.StringIO(text), 1) if line.strip())


def _json_record(line: str) -> Record | BadRow:
    try:
        record = parse_json(line)
    except json.JSONDecodeError as error:
        return BadRow(f"expected one JSON object a line, found invalid JSON ({error.msg} at column {error.colno})")
    except ValueError as error:
        return BadRow(f"expected one JSON object a line, found invalid JSON ({one_line(error)})")
    return _as_record(record)


def _as_record(record: Json) -> Record | BadRow:
    if isinstance(record, dict):
        return record
    return BadRow(f"expected a JSON object with named fields, found {json.dumps(record, ensure_ascii=False)[:40]}")


def _json(path: Path, content: bytes) -> Numbered:
    """The records of a JSON array of objects. Many ``.json`` files hold one object per line; these are read too."""
    text = _decoded(path, content)
    if text.lstrip()[:1] != "[":
        yield from _json_lines(path, content)
        return
    try:
        elements = parse_json(text)
    except ValueError as error:
        raise DataError("RW206", f"{path}: expected a JSON array of objects, found none ({one_line(error)}).") from None
    yield from ((number, _as_record(element)) for number, element in enumerate(elements, 1))


def _table(delimiters: str) -> Callable[[Path, bytes], Numbered]:
    """A reader of tables. The header decides which of ``delimiters`` the table uses."""

    def read(path: Path, content: bytes) -> Numbered:
        text = _decoded(path, content)
        previous_limit = csv.field_size_limit(LONGEST_FIELD_BYTES)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text, delimiters), strict=True)
        try:
            yield from _table_rows(path, reader)
        except csv.Error as error:
            raise DataError(
                "RW206", f"{path}, line {reader.line_num}: broken table ({error}); check the quotes up to there."
            ) from None
        finally:
            csv.field_size_limit(previous_limit)

    return read


def _delimiter(text: str, delimiters: str) -> str:
    """The first delimiter that occurs in the header. Spreadsheets write ``;`` where the decimal sign is a comma."""
    header = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
    return next((mark for mark in delimiters if len(next(csv.reader([header], delimiter=mark))) > 1), delimiters[0])


def _table_rows(path: Path, reader: csv._reader) -> Numbered:  # type: ignore[name-defined]
    header: list[str] | None = None
    start = 1
    for values in reader:
        if not values:
            pass
        elif header is None:
            header = [name.strip() for name in values]
            if twice := next((name for name, count in Counter(header).items() if name and count > 1), None):
                raise DataError("RW207", f"{path} has two columns `{twice}`; rename or remove one of them.")
        elif len(values) != len(header):
            yield start, BadRow(f"expected {len(header)} columns ({', '.join(header)}), found {len(values)}")
        else:
            yield start, dict(zip(header, values))
        # A quoted field may span lines: the next row starts after all of them.
        start = reader.line_num + 1


def _parquet(path: Path, content: bytes) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(content)).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("RW206", f"cannot read {path} as parquet: {one_line(error)}.") from None
    yield from table_records(table, str(path))


def table_records(table: pyarrow.Table, source: str) -> Numbered:
    """The rows of a table with their numbers, counted from 1.

    Arrow adds nulls so that all objects of a column have the same fields; these nulls are removed. Raises DataError
    (RW206) for values that Python cannot hold (a date far away, for example).
    """
    columns = {}
    for name, column in zip(table.column_names, table.columns):
        try:
            columns[name] = [_without_nulls(value) for value in column.to_pylist()]
        except (ValueError, OverflowError) as error:
            raise DataError("RW206", f"cannot read the column `{name}` of {source}: {one_line(error)}.") from None
    for number in range(table.num_rows):
        yield number + 1, {name: values[number] for name, values in columns.items()}


def _without_nulls(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text_lines(path: Path, content: bytes) -> Numbered:
    """Texts, or the pairs of LoRA's E2E files: ``name : A | food : B||A serves B .``"""
    lines = list(_lines(_decoded(path, content)))
    # A single line with the separator may be prose.
    paired = sum("||" in line for _, line in lines) * 2 > len(lines)
    for number, line in lines:
        mr, _, ref = line.partition("||")
        yield number, {"mr": mr, "ref": ref} if paired else {"text": line}


KINDS: dict[str, Callable[[Path, bytes], Numbered]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table(",;\t"),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _text_lines,
}
