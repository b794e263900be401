"""The prompts and conversations for ``rankwise generate``, from options, files and standard input."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rankwise.cli.settings import GenerateSettings
from rankwise.data.files import kind_of
from rankwise.data.formats import BadRow, conversation, text_field, tools_of
from rankwise.data.rows import Message
from rankwise.errors import ConfigError, DataError
from rankwise.foreign import Fields, Json, parse_json

STDIN = "-"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation for the model to answer. A prompt is a conversation of one message."""

    messages: tuple[Message, ...]
    tools: tuple[Fields, ...] | None = None
    # Its name in messages.
    place: str = "the prompt"

    @property
    def prompt(self) -> str:
        return str(self.messages[-1]["content"])


def read_conversations(settings: GenerateSettings) -> list[Conversation]:
    """Everything to answer, in order: the prompts, the prompts of the file, the conversations.

    Raises ConfigError: RW124 where there is nothing to answer, RW125 for two readers of standard input, RW126 for a
    second system message; DataError: RW201, RW202, RW205 for a file that cannot be read, RW203 for entries that are no
    prompt or conversation, RW204 for an empty file.
    """
    sources = [*settings.prompt, *(str(path) for path in (settings.prompt_file, settings.messages) if path)]
    if sources.count(STDIN) > 1:
        raise ConfigError("RW125", "standard input (-) can be read once; give the rest by files or --prompt TEXT.")
    prompts = [text for given in settings.prompt for text in (_prompts(STDIN) if given == STDIN else [given])]
    prompts += _prompts(str(settings.prompt_file)) if settings.prompt_file else []
    found = [Conversation(({"role": "user", "content": text},)) for text in prompts]
    found += _conversations(str(settings.messages)) if settings.messages else []
    if not found:
        options = "--prompt TEXT, --prompt-file FILE or --messages FILE"
        raise ConfigError("RW124", f"there is nothing to answer; give {options}.")
    return [_with_system(one, settings.system) for one in found] if settings.system is not None else found


def _with_system(given: Conversation, system: str) -> Conversation:
    if any(message["role"] == "system" for message in given.messages):
        text = f"{given.place} has a system message of its own; leave --system or that message out."
        raise ConfigError("RW126", text)
    return dataclasses.replace(given, messages=({"role": "system", "content": system}, *given.messages))


def _prompts(source: str) -> list[str]:
    """The prompts of a file: one per line; in JSON lines each is a text or an object with a `prompt`."""
    kind = kind_of(Path(source))
    if kind not in (None, ".txt", ".jsonl") or source.endswith(".gz"):
        raise DataError("RW202", f"{source} is not a list of prompts; give one a line as text, or as .jsonl.")
    name, text = _read(source)
    lines = _lines(name, text)
    if not source.endswith(".jsonl"):
        return _all_of([line for _, line in lines], name)
    return _all_of([_checked(_prompt, _parsed(line), place) for place, line in lines], name)


def _prompt(record: Json) -> str:
    return text_field(record if isinstance(record, dict) else {"prompt": record}, "prompt")


def _conversations(source: str) -> list[Conversation]:
    """The conversations of a file: JSON with one or a list of them, or JSON lines with one per line."""
    name, text = _read(source)
    whole = _parsed(text)
    if isinstance(whole, BadRow) and not source.endswith(".json"):
        items = [(place, _parsed(line)) for place, line in _lines(name, text)]
    elif isinstance(whole, list) and not any(isinstance(item, dict) and "role" in item for item in whole):
        items = [(f"{name}, conversation {number}", item) for number, item in enumerate(whole, 1)]
    else:
        items = [(name, whole)]
    made = [_checked(functools.partial(_conversation, place), item, place) for place, item in items]
    return _all_of(made, name)


def _conversation(place: str, record: Json) -> Conversation:
    if not isinstance(record, list | dict):
        raise BadRow(f"expected a list of messages or an object with `messages`, found {str(record)[:40]!r}")
    record = {"messages": record} if isinstance(record, list) else record
    messages = conversation(record)
    if messages[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"expected a `user` or `tool` message to answer at the end, found `{messages[-1]['role']}`")
    return Conversation(messages, tools_of(record), place)


def _read(source: str) -> tuple[str, str]:
    """(name, text) of a file or of standard input."""
    name = "standard input" if source == STDIN else source
    if source == STDIN and sys.stdin is None:
        raise DataError("RW201", "standard input is closed; give the prompts in a file or by --prompt TEXT.")
    try:
        content = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
        return name, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("RW205", f"{name} is not UTF-8 (byte {error.start}); save it as such.") from None
    except OSError as error:
        raise DataError("RW201", f"cannot open {name}: {error.strerror or error}.") from None


def _lines(name: str, text: str) -> list[tuple[str, str]]:
    """(place, line) of each line. Only newlines separate lines, not Unicode's other line breaks."""
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    return [(f"{name}, line {number}", line) for number, line in lines if line.strip()]


def _parsed(text: str) -> Json | BadRow:
    """The JSON value of ``text``, or a BadRow with the fault."""
    try:
        return parse_json(text)
    except ValueError as error:
        return BadRow(f"invalid JSON ({error})")


def _checked(make: Callable[[Json], T], record: Json | BadRow, place: str) -> T | BadRow:
    try:
        if isinstance(record, BadRow):
            raise record
        return make(record)
    except BadRow as error:
        return BadRow(f"{place}: {error}")


def _all_of(items: Sequence[T | BadRow], name: str) -> list[T]:
    """The items. Raises DataError: RW203 with the first three bad ones, RW204 where there is none."""
    bad = [str(item) for item in items if isinstance(item, BadRow)]
    if bad:
        more = f"; {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError("RW203", f"{'; '.join(bad[:3])}{more}. Correct or remove these.")
    if not items:
        raise DataError("RW204", f"{name} holds nothing to answer; give at least one prompt or conversation.")
    return [item for item in items if not isinstance(item, BadRow)]
