"""Read text and JSON lines for the scorers. Every message names the place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rankwise import data
from rankwise.data import BadRow
from rankwise.errors import DataError, warn
from rankwise.evaluation import Example
from rankwise.foreign import Fields


class Line(NamedTuple):
    """One object and its line, counted from 1."""

    line: int
    fields: Fields

    def text(self, path: Path, *names: str) -> str:
        """The first of the fields ``names`` that exists. Raises DataError (RA238) if none exists, or it is not
        text.
        """
        name = next((name for name in names if name in self.fields), None)
        if name is None:
            there = ", ".join(map(str, self.fields)) or "nothing"
            wanted = " or ".join(names)
            raise DataError("RA238", f"{path}, line {self.line}: there is no {wanted}; the line has {there}.")
        value = self.fields[name]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError("RA238", f"{path}, line {self.line}: {name} is a {kind} and should be text.")
        return value


def read_text(path: Path) -> str:
    """The text of a file as ``rankwise.data`` reads it. Raises DataError (RA230)."""
    with _coded():
        return data.read_text(path)


def read_records(path: Path) -> Sequence[Line]:
    """JSON lines, or one JSON array of objects. Raises DataError: RA230 cannot be read, RA238 no JSON objects."""
    with _coded():
        content = data.read_file(path, ".json")
    for line, record in content.records:
        if isinstance(record, BadRow):
            raise DataError("RA238", f"{path}, {content.counted_in} {line}: {record}.")
    return [Line(line, record) for line, record in content.records if not isinstance(record, BadRow)]


@contextlib.contextmanager
def _coded() -> Iterator[None]:
    """Give reading errors of texts and ratings a code of their own."""
    try:
        yield
    except DataError as error:
        raise DataError("RA230", f"cannot read a file of texts: {error.message}") from None


def no_duplicates(place: Path | str, name: str, values: Sequence[str], lines: Sequence[int]) -> None:
    """Raise DataError (RA234) if two values are equal, with the lines of the first two."""
    seen: dict[str, int] = {}
    for value, line in zip(values, lines):
        if value in seen:
            raise DataError(
                "RA234",
                f"{place}: lines {seen[value]} and {line} have the same {name}, {shortened(value)}; keep one of them.",
            )
        seen[value] = line


def shortened(text: str, longest: int = 80) -> str:
    """``text`` in quotes on one line, cut if it is long."""
    line = " ".join(text.split())
    return f'"{line[: longest - 3]}..."' if len(line) > longest else f'"{line}"'


def warn_of_empty(task: str, examples: Sequence[Example]) -> list[str]:
    """Warn (RA253) of empty answers, with their number. They are scored like others."""
    empty = sum(not example.prediction.strip() for example in examples)
    if not empty:
        return []
    note = f"{empty:,} of {len(examples):,} answers are empty"
    warn("RA253", f"{task}: {note}; they are scored as they are. Look at the prompts, or at where answers stop.")
    return [note]
