"""The layouts of training data, and the checks of a row.

Detect the layout of a source from its columns, and convert its records to rows.

``detect`` picks a ``Format`` from a record. ``rows_from_records`` turns every record into a ``Row``. It raises once for
all bad records, with their places, or leaves them out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import TypeGuard

from rankwise.data.rows import NEVER, Kind, Message, Problem, Row, Rows, Unit, check_bad_rows, content_sha256
from rankwise.errors import ConfigError, DataError, warn
from rankwise.foreign import Fields, JsonObject, parse_json

Record = Fields
Columns = tuple[str | None, str | None]
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
# Fields of OpenAI's and axolotl's files that say whether an answer is trained. Here every answer is.
WEIGHTS = ("weight", "train", "training")
# {type: its name in messages}, for values in place of text.
TYPE_NAMES: Mapping[type, str] = {
    bool: "the truth value",
    int: "the number",
    float: "the number",
    list: "the list",
    dict: "the object",
}


class BadRow(ValueError):
    """A faulty record; the message says what was expected and what was found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One layout: the columns it needs and how a record becomes the fields of a ``Row``."""

    name: str
    kind: Kind
    columns: tuple[str, ...]
    # Converts a record to the fields of a Row, or raises BadRow.
    fields: Callable[[Record], JsonObject]
    uses_template: bool = True
    separator: str = ""
    # Columns that are read if they exist.
    optional: tuple[str, ...] = ()
    # Type of the first column's values, where it distinguishes layouts with the same columns.
    holds: type = object
    # Further required columns that hold no text.
    marks: tuple[str, ...] = ()

    def fits(self, record: Record) -> bool:
        is_there = all(column in record for column in (*self.columns, *self.marks))
        return is_there and isinstance(record[self.columns[0]], self.holds)


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def is_number(value: object) -> TypeGuard[int | float | Decimal]:
    """Whether the value is a finite number. pandas writes a missing number as NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return False
    return isinstance(value, int) or math.isfinite(value)


def text_field(record: Record, column: str) -> str:
    """The column's text; a number is taken as its digits. Raises BadRow for blank text or a different type."""
    value = record.get(column)
    if is_number(value):
        return str(value)
    if isinstance(value, str) and value.strip():
        return encodable(value, f"`{column}`")
    raise BadRow(f"expected text in `{column}`, found {found_in(record, column)}")


def encodable(text: str, place: str) -> str:
    """The text unchanged. Raises BadRow for a lone surrogate, which JSON can hold and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(f"expected text in {place}, found half a surrogate pair ({half})") from None
    return text


def found_in(record: Record, column: str) -> str:
    if column not in record:
        return f"no such field (fields: {quoted(record) or 'none'})"
    value = record[column]
    if value is None:
        return "null"
    if isinstance(value, str):
        return "an empty string" if not value else "only white space"
    return f"{TYPE_NAMES.get(type(value), type(value).__name__)} {str(value)[:40]!r}"


def pair(prompt: str, completion: str) -> Callable[[Record], JsonObject]:
    def fields(record: Record) -> JsonObject:
        return {"prompt": text_field(record, prompt), "completion": text_field(record, completion)}

    return fields


def _alpaca(context: str, answer: str) -> Callable[[Record], JsonObject]:
    def fields(record: Record) -> JsonObject:
        prompt = text_field(record, "instruction")
        extra = record.get(context)
        if extra is not None and not isinstance(extra, str) and not is_number(extra):
            raise BadRow(f"expected text or nothing in `{context}`, found {found_in(record, context)}")
        if extra is not None and str(extra).strip():
            prompt = f"{prompt}\n\n{extra}"
        return {"prompt": prompt, "completion": text_field(record, answer)}

    return fields


def _data_to_text(record: Record) -> JsonObject:
    """The prompt is one line and ends with a newline."""
    return {"prompt": text_field(record, "mr").strip() + "\n", "completion": text_field(record, "ref").strip()}


def _text(record: Record) -> JsonObject:
    return {"text": text_field(record, "text")}


def _messages(record: Record) -> JsonObject:
    messages = conversation(record)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("expected at least one `assistant` message in `messages`, found none to train on")
    return {"messages": messages, "tools": tools_of(record)}


def _sharegpt(record: Record) -> JsonObject:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"expected a list of turns in `conversations`, found {found_in(record, 'conversations')}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
            raise BadRow(f"expected `from` and `value` in turn {number} of `conversations`, found {str(turn)[:60]!r}")
        role = SHAREGPT_ROLES.get(turn["from"], turn["from"])
        more = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({**more, "role": role, "content": turn.get("value")})
    return _messages({**record, "messages": messages})


def _prompt_messages(record: Record) -> JsonObject:
    prompt = message_list(record, "prompt")
    if isinstance(record.get("completion"), str):
        answer: tuple[Message, ...] = ({"role": "assistant", "content": text_field(record, "completion")},)
    else:
        answer = message_list(record, "completion")
    if not any(message["role"] == "assistant" for message in answer):
        raise BadRow("expected an `assistant` message in `completion`, found none to train on")
    return {"messages": prompt + answer, "tools": tools_of(record), "first_trained": len(prompt)}


def conversation(record: Record) -> tuple[Message, ...]:
    """The row's messages, with its `system` field as the first one if it has one. Raises BadRow."""
    messages = message_list(record, "messages")
    if not record.get("system"):
        return messages
    if messages[0]["role"] == "system":
        raise BadRow("expected `system` or a system message, found both")
    return message_list({"system": [{"role": "system", "content": record["system"]}]}, "system") + messages


def message_list(record: Record, column: str) -> tuple[Message, ...]:
    messages = record.get(column)
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"expected a list of messages in `{column}`, found {found_in(record, column)}")
    return tuple(_message(message, f"message {number} of `{column}`") for number, message in enumerate(messages, 1))


def _message(message: object, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow(f"expected an object with `role` and `content` as {place}, found {str(message)[:40]!r}")
    if message.get("role") not in ROLES:
        raise BadRow(f"expected one of {', '.join(ROLES)} as `role` of {place}, found {message.get('role')!r}")
    calls = _tool_calls(message, place)
    is_call = message["role"] == "assistant" and bool(calls)
    content = "" if is_call and message.get("content") is None else _content(message, place)
    if not content and not is_call and message["role"] in ("user", "assistant"):
        raise BadRow(f"expected text in `content` of {place}, found {found_in(message, 'content')}")
    if message["role"] == "assistant":
        check_weights(message, place)
    kept = {key: value for key, value in message.items() if value is not None and key not in ("tool_calls", *WEIGHTS)}
    return {**kept, "content": content, **({"tool_calls": calls} if calls else {})}


def check_weights(message: Record, place: str) -> None:
    """Raise BadRow for an answer that is marked as excluded from training."""
    for key in WEIGHTS:
        if message.get(key) is not None and not message[key]:
            raise BadRow(f"expected only answers to train on, found {place} with `{key}` {json.dumps(message[key])}")


def _content(message: Record, place: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return encodable(content, f"`content` of {place}") if content.strip() else ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if not parts or len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise BadRow(f"expected text in `content` of {place}, found {found_in(message, 'content')}")
    return encodable("".join(map(str, texts)), f"`content` of {place}")


def _tool_calls(message: Record, place: str) -> list[Fields]:
    """The calls of a message, in OpenAI's form or without the `function` wrapper."""
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow(f"expected a list of objects in `tool_calls` of {place}, found {found_in(message, 'tool_calls')}")
    for number, call in enumerate(calls, 1):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(
                f"expected the `name` of a function in tool call {number} of {place}, found {str(call)[:40]!r}"
            )
    return calls


def tools_of(record: Record) -> tuple[Fields, ...] | None:
    """The tools of a row: a list of JSON schemas, or its JSON text, because a table has no column for schemas."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise BadRow(f"expected JSON or a list of objects in `tools`, found invalid JSON ({error})") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(f"expected a list of objects in `tools`, found {found_in({'tools': tools}, 'tools')}")
    return tuple(tools)


PROMPT_MESSAGES = Format(
    name="chat (prompt, completion as messages)", kind="chat", columns=("prompt", "completion"), fields=_prompt_messages
)
# Tried in this order: the first layout whose columns exist is used.
FORMATS: Collection[Format] = (
    Format(name="chat (messages)", kind="chat", columns=("messages",), fields=_messages, optional=("system",)),
    Format(
        name="chat (conversations)", kind="chat", columns=("conversations",), fields=_sharegpt, optional=("system",)
    ),
    Format(
        name="prompt and completion",
        kind="prompt",
        columns=("prompt", "completion"),
        fields=pair("prompt", "completion"),
    ),
    Format(
        name="prompt and response", kind="prompt", columns=("prompt", "response"), fields=pair("prompt", "response")
    ),
    Format(
        name="Alpaca (instruction, input, output)",
        kind="prompt",
        columns=("instruction", "output"),
        fields=_alpaca("input", "output"),
        separator="\n",
        optional=("input",),
    ),
    Format(
        name="Dolly (instruction, context, response)",
        kind="prompt",
        columns=("instruction", "response"),
        fields=_alpaca("context", "response"),
        separator="\n",
        optional=("context",),
    ),
    Format(
        name="question and answer",
        kind="prompt",
        columns=("question", "answer"),
        fields=pair("question", "answer"),
        separator="\n",
    ),
    Format(name="E2E (mr, ref)", kind="prompt", columns=("mr", "ref"), fields=_data_to_text, uses_template=False),
    Format(name="text (text)", kind="text", columns=("text",), fields=_text, uses_template=False),
)


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
    """The format of the first record that has one; None without records. Raises DataError RW207 if none has one."""
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
    return Format(
        name=f"columns ({prompt}, {completion})",
        kind="prompt",
        columns=(prompt, completion),
        fields=pair(prompt, completion),
    )


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
        raise DataError("RW204", f"{source} holds no rows; give at least one example.")
    shown = [record for _, record in records if isinstance(record, Mapping)][:LOOKED_AT]
    if any(name in record for _, record in records if isinstance(record, Mapping) for name in ("images", "image")):
        raise ConfigError("RW182", f"{source} holds images, which rankwise does not read; remove their column.")
    layout = _first_layout(shown, source, columns, formats)
    rows, problems = _convert(records, source, layout, counted_in)
    check_bad_rows(problems, len(records), allowed=skip_bad_rows, before=bad_before)
    assert layout is not None, "without a record that shows the layout every row is bad"
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
                    # In a row with a prompt, a column of this name may have a different meaning.
                    with contextlib.suppress(BadRow):
                        fields["tools"] = tools_of(record)
                if (worse := fields.pop("rejected", None)) is not None and "tools" in fields:
                    worse["tools"] = fields["tools"]
                make = functools.partial(Row, kind=layout.kind, source=source, line=line, counted_in=unit)
                rows.append(make(**fields, rejected=None if worse is None else make(**worse)))
        except BadRow as bad:
            problems.append(Problem(source=source, line=line, counted_in=unit, code="RW203", why=str(bad), index=index))
    return rows, problems


def _tell_of_unread(records: Sequence[Record | BadRow], source: str, layout: Format, *, named: bool) -> None:
    """Warn of columns that are not read and hold text. Numbers, single words and truth values count as notes.

    Rows of a different layout are reported as bad rows instead.
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
