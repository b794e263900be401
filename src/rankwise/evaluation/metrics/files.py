"""Text and JSON lines as the scorers read them, with the place in every message."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rankwise.errors import DataError
from rankwise.foreign import parse_json, unpacked

JSON_SUFFIXES = (".jsonl", ".json")
SHOWN = 3


class Record(NamedTuple):
    """One object and the line it stands in, counted from 1."""

    line: int
    fields: Mapping[str, Any]

    def text(self, path: Path, *names: str) -> str:
        """The first of the fields ``names`` that is there. Raises DataError (RW238) for none, or for one not text."""
        name = next((name for name in names if name in self.fields), None)
        if name is None:
            there = ", ".join(map(str, self.fields)) or "nothing"
            wanted = " or ".join(names)
            raise DataError("RW238", f"{path}, line {self.line}: there is no {wanted}; the line has {there}.")
        value = self.fields[name]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError("RW238", f"{path}, line {self.line}: {name} is a {kind} and should be text.")
        return value


def kind_of(path: Path) -> str:
    """The extension in lower case, ``.gz`` aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")


def read_text(path: Path) -> str:
    """UTF-8 text, gzipped or not, without a byte order mark. Raises DataError (RW230)."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = unpacked(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = f"byte 0x{content[error.start]:02x} in line {line} is not UTF-8; convert the file with iconv"
    except ValueError as error:
        reason = str(error)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    raise DataError("RW230", f"cannot read {path}: {reason}.")


def read_records(path: Path) -> Sequence[Record]:
    """JSON lines, or one JSON array of objects. Raises DataError: RW230 cannot be read, RW238 no JSON objects."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return [_record(path, number, value) for number, value in enumerate(_array(path, text), 1)]
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return [_record(path, number, _parsed(path, number, line)) for number, line in lines]


def _array(path: Path, text: str) -> Sequence[Any]:
    content = _parsed(path, 1, text)
    return content if isinstance(content, list) else [content]


def _parsed(path: Path, number: int, text: str) -> Any:
    try:
        return parse_json(text, constants=True, halves=True)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            "RW238", f"{path}, line {number}: this is no JSON ({reason}); write one object a line."
        ) from None


def _record(path: Path, number: int, value: Any) -> Record:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError("RW238", f"{path}, line {number}: expected a JSON object with named fields, found a {kind}.")
    return Record(number, value)


def no_duplicates(path: Path, name: str, values: Sequence[str], lines: Sequence[int]) -> None:
    """Raises DataError (RW234) with the lines of the first two ``values`` that are equal."""
    seen: dict[str, int] = {}
    for value, line in zip(values, lines):
        if value in seen:
            raise DataError(
                "RW234",
                f"{path}: lines {seen[value]} and {line} have the same {name}, {shortened(value)}; keep one of them.",
            )
        seen[value] = line


def listed(items: Sequence[object]) -> str:
    """The first few of ``items``, and how many more there are."""
    shown = ", ".join(map(str, items[:SHOWN]))
    return f"{shown} and {len(items) - SHOWN:,} more" if len(items) > SHOWN else shown


def shortened(text: str, longest: int = 80) -> str:
    """``text`` in quotes on one line, cut where it is long."""
    line = " ".join(text.split())
    return f'"{line[: longest - 3]}..."' if len(line) > longest else f'"{line}"'
