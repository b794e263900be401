"""The output of a command: text for people on the console, or the one document of ``--json`` for programs.

Numbers are written as people read them. Tables have no lines, a dim head, and the title above.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import TextIO

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rankwise.errors import RankwiseWarning, heard
from rankwise.foreign import Fields, Json
from rankwise.reports.numbers import visible

# The result of a command, which --json prints.
Document = Fields

DEBUG_VARIABLE = "RANKWISE_DEBUG"

# Read when the libraries are imported, which is after the command line has been parsed.
QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}

# Characters of a printed message.
LONGEST_MESSAGE = 4000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# Width of output into a file or another program, in which every table fits.
PLAIN_WIDTH = 120


class Output:
    """Where a command prints: to stdout, or with ``--json`` to stderr, so that stdout holds only the document."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.console = Console(stderr=as_json, highlight=False)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = PLAIN_WIDTH

    @property
    def is_terminal(self) -> bool:
        """Whether the console is a terminal that can be redrawn."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def waiting(self, text: str) -> contextlib.AbstractContextManager[object]:
        """A spinner on a terminal, nothing elsewhere."""
        return self.console.status(text) if self.is_terminal else contextlib.nullcontext()

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print a line as it is: no markup, no wrapping that would break a path."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line on stderr, so that stdout holds what a model says and nothing about it."""
        Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)


def debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def print_document(document: Document, stream: TextIO | None = None) -> None:
    """Print the JSON document of ``--json``. NaN and infinity become null, since JSON has neither."""
    text = json.dumps(_without_nan(document), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    # A lone surrogate, which file names can hold, becomes a JSON escape.
    print(text.encode("utf-8", "backslashreplace").decode(), file=stream or sys.stdout, flush=True)


def shortened(message: str) -> str:
    """Both ends of a message that would not fit on a screen."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    half = LONGEST_MESSAGE // 2
    return f"{message[:half]}...({len(message) - 2 * half:,} more characters)...{message[-half:]}"


def _without_nan(value: Json) -> Json:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


def print_message(kind: str, code: str, text: str) -> None:
    """Print ``error RW103: ...`` as one line on stderr."""
    colour = {"error": "bold red", "warning": "bold yellow"}.get(kind, "bold")
    # Names in untrusted files may hold control characters, which would act on the terminal.
    line = _CONTROL.sub("?", " ".join(part.strip() for part in shortened(text).splitlines()))
    Console(stderr=True, highlight=False).print(f"[{colour}]{kind} {code}[/]: {escape(line)}", soft_wrap=True)


@contextlib.contextmanager
def only_our_messages() -> Iterator[None]:
    """Print each RankwiseWarning once; keep other libraries' logs, warnings and progress bars silent."""
    seen: set[str] = set()

    def tell(warning: RankwiseWarning) -> bool:
        if str(warning) not in seen:
            seen.add(str(warning))
            print_message("warning", warning.code, warning.message)
        return False

    with heard(tell), _silence() if not debugging() else contextlib.nullcontext():
        if not debugging():
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", RankwiseWarning)
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence other libraries. The level of logging is restored; the environment is not, since each library reads it
    once.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def one_line(text: str, limit: int = 240) -> str:
    """``text`` without line breaks and control characters, cut at ``limit`` characters."""
    joined = visible(" ".join(text.split()))
    return joined if len(joined) <= limit else f"{joined[: limit - 3]}..."


def light_table(*, gap: int = 2, expand: bool = False) -> Table:
    """An empty table with ``gap`` blanks between its columns, as wide as its content unless ``expand``."""
    return Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim", expand=expand)


def titled(title: str, table: Table) -> Group:
    """A table with its title above: rich would wrap a title at the width of the table."""
    return Group(Text(title, style="bold"), table)
