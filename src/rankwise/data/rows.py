"""The rows that every reader returns and every encoder takes, each with the place it came from.

Bad rows make one error that names them, or one warning if they may be left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, overload

from rankwise.errors import DataError, warn
from rankwise.foreign import Fields
from rankwise.labels import Target

Kind = Literal["chat", "prompt", "text"]
Unit = Literal["line", "row"]
Message = Fields


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One example. ``chat`` fills messages, ``prompt`` fills prompt and completion, ``text`` fills text."""

    kind: Kind
    # Name of the file, hub data set or demo set.
    source: str
    # 1-based; the line where the row starts, or its number where the source has no line for each row.
    line: int
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    # Tools of a chat row, which are passed to the chat template.
    tools: tuple[Fields, ...] | None = None
    # Assistant messages before this index belong to the prompt.
    first_trained: int = 0
    # What ``line`` counts: rows in JSON arrays, parquet and hub data.
    counted_in: Unit = "line"
    # For a prompt to be answered: the whole record, for rewards.
    columns: Fields | None = None
    # For a pair, of which this is the better answer: the worse one.
    rejected: Row | None = None
    # For marked answers: whether the answer is good.
    label: bool | None = None
    # For a text with a label: that.
    target: Target | None = None

    @property
    def place(self) -> str:
        """``train.csv, line 12``: how an error names this row."""
        return f"{self.source}, {self.counted_in} {self.line}"

    @property
    def sides(self) -> tuple[Row, ...]:
        """(better answer, worse answer) of a pair; (row,) of any other row."""
        return (self,) if self.rejected is None else (self, self.rejected)

    def content(self) -> str:
        """All text of the row, for hashing and comparing."""
        turns = [f"{message['role']}\n{message.get('content') or ''}" for message in self.messages]
        worse = [] if self.rejected is None else [self.rejected.content()]
        return "\n".join([*turns, self.prompt + self.completion, self.text, *worse]).strip()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A row that cannot be trained on, and why."""

    source: str
    line: int
    # As of a Row.
    counted_in: Unit
    code: str
    # The reason, without a final full stop.
    why: str
    # Among all rows of the source, from 0; None for a row that could be read.
    index: int | None = None

    @property
    def place(self) -> str:
        return f"{self.source}, {self.counted_in} {self.line}"

    def to_json(self) -> dict[str, str]:
        return {"row": self.place, "code": self.code, "why": self.why}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Sequence[Row]):
    """Rows of one source, all of one kind. A slice is again ``Rows``."""

    items: Sequence[Row]
    kind: Kind
    source: str
    # SHA-256 of the file's bytes; for a folder, of its files' names and hashes; for hub and demo data, of the rows.
    sha256: str
    # The columns that were recognised, for people: "Alpaca (instruction, input, output)".
    format: str
    # Whether the tokenizer's chat template is used; if not, prompt and completion are concatenated.
    uses_template: bool = True
    # Text between prompt and completion without a chat template.
    separator: str = ""
    # Bad rows of the source, which are not among ``items``.
    problems: tuple[Problem, ...] = ()

    @property
    def prompt_ending(self) -> str:
        """The ending that a prompt needs to look like those of the training rows. E2E prompts end with a newline."""
        return self.separator or ("\n" if self.items and self.items[0].prompt.endswith("\n") else "")

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return dataclasses.replace(self, items=self.items[index])
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.items)


def content_sha256(records: Iterable[object]) -> str:
    """sha256 over the JSON of the records, for data that is not a file."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


# Value of ``skip_bad_rows`` for callers without such an option, which a message must not advise.
NEVER = -1
NAMED = 3
REMEDY = "Correct or remove these rows"
REMEDIES = {
    "RW211": "Correct these rows or the template",
    "RW212": "Give a template with {% generation %} marks by --chat-template FILE",
    "RW221": "Give a template that writes it by --chat-template FILE, or take it out of the rows",
}


def check_bad_rows(problems: Sequence[Problem], total: int, *, allowed: int | None = NEVER, before: int = 0) -> None:
    """Warn of bad rows (RW223) if at most ``allowed`` are bad (None: any number) and good rows remain.

    ``total`` counts good and bad rows; ``before``: number of rows of the source that were left out before. Raises
    DataError with the code of the first bad row if more than ``allowed`` are bad. The message advises
    --skip-bad-rows, except with NEVER.
    """
    if not problems:
        return
    count, code = len(problems), problems[0].code
    if count < total and (allowed is None or before + count <= allowed):
        warn("RW223", f"{count} of {total:,} rows of {problems[0].source} are left out: {listed(problems)}.")
        return
    has_option = allowed != NEVER and count < total
    skipping = f", or have `train` leave them out with --skip-bad-rows {before + count}" if has_option else ""
    spent = f" (--skip-bad-rows {allowed})" if allowed and allowed > 0 else ""
    rest = f"; and {count - NAMED} more of {total:,} rows" if count > NAMED else ""
    remedy = REMEDIES.get(code, REMEDY)
    raise DataError(code, f"{listed(problems)}{rest}{spent}. {remedy}{skipping}.")


def listed(problems: Sequence[Problem]) -> str:
    """The first few problems, with the source named once: ``train.csv, line 3, line 7: why; line 9: why``."""
    parts: list[str] = []
    source = None
    for why, alike in itertools.groupby(problems[:NAMED], key=lambda problem: problem.why):
        places = []
        for problem in alike:
            own = f"{problem.counted_in} {problem.line}"
            places.append(own if problem.source == source else problem.place)
            source = problem.source
        parts.append(f"{', '.join(places)}: {why}")
    return "; ".join(parts)
