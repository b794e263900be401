"""Find the parts of a row that a chat template omits, by rendering the row with and without marks.

A marked copy of the conversation has a distinct number before and after each text. A number that is missing in the
output shows that the template omits this text. The result holds for all conversations of the same shape. A row whose
rendered text lacks the words of a message is also rendered with marks, since templates may depend on the content.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from rankwise.data.rows import Message
from rankwise.errors import DataError
from rankwise.foreign import Fields, Json, JsonObject

# transformers' type of tools.
Tools = list[Any] | None
# Digits survive changes of case, JSON and neighbouring words; no data hold these numbers by chance.
FIRST_MARK = 73_190_284_600_000
# Names for the reasoning of a message; transformers passes the first two to every template.
REASONING = ("reasoning_content", "thinking", "reasoning")
CALLS = ("tool_calls", "function_call")
# Fields that are checked separately, and names and ids that many templates do not use.
UNWRITTEN = {"role", "content", "name", "id", "tool_call_id", *REASONING, *CALLS}


@dataclasses.dataclass(frozen=True)
class Unwritten:
    """The parts that a template omits, in words: those required for training, and optional ones."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class _Thing:
    """A part that a template should write, with its marks.

    ``part`` says what is lost where only some of the marks are missing.
    """

    name: str
    marks: tuple[str, ...]
    required: bool
    part: str = ""
    part_required: bool = False

    def lost_in(self, text: str) -> tuple[str, bool] | None:
        found = [mark in text for mark in self.marks]
        if all(found):
            return None
        return (self.part, self.part_required) if any(found) else (self.name, self.required)


def left_out(
    messages: Sequence[Message],
    tools: Tools,
    text: str,
    known: dict[Hashable, Unwritten],
    render: Callable[[Sequence[Message], Tools], str],
) -> Unwritten:
    """The parts of a conversation that are missing in its ``text``.

    ``known`` caches the answer by the conversation's shape.
    """
    shape = (len(tools or ()), *map(_shape, messages))
    is_whole = all(message["content"].strip() in text for message in messages)
    if is_whole and shape in known:
        return known[shape]
    found = _ask(messages, tools, render)
    if is_whole:
        known[shape] = found
    return found


def _shape(message: Message) -> tuple[Hashable, ...]:
    calls = [len(message.get(key) or ()) for key in CALLS]
    return (message["role"], bool(message["content"]), *calls, *sorted(message))


def _ask(messages: Sequence[Message], tools: Tools, render: Callable[[Sequence[Message], Tools], str]) -> Unwritten:
    marks = map(str, itertools.count(FIRST_MARK))
    things: list[_Thing] = []
    marked_tools = None if tools is None else [_marked_tool(tool, marks, things) for tool in tools]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    copies = [
        _marked_message(message, index, index not in answers[:-1], marks, things)
        for index, message in enumerate(messages)
    ]
    try:
        text = render(copies, marked_tools)
    except DataError:
        # A template that refuses the marks cannot be tested; it has rendered the row itself.
        return Unwritten()
    lost = dict.fromkeys(found for thing in things if (found := thing.lost_in(text)))
    return Unwritten(
        tuple(name for name, required in lost if required), tuple(name for name, required in lost if not required)
    )


def _marked_tool(tool: Fields, marks: Iterator[str], things: list[_Thing]) -> Json:
    mark = next(marks)
    things.append(_Thing("`tools`", (mark,), True))
    return _marked(tool, mark, spare=("type",))


def _marked_message(
    message: Message, index: int, is_last: bool, marks: Iterator[str], things: list[_Thing]
) -> JsonObject:
    """A message with marks.

    ``is_last``: no later answer follows. Templates may drop the reasoning of earlier answers.
    """
    place = f"of message {index + 1}"
    copy = dict(message)
    if message["content"]:
        before, behind = next(marks), next(marks)
        copy["content"] = f"{before}{message['content']}{behind}"
        part = f"part of the `content` {place}" if is_last else "part of the `content` of earlier answers"
        things.append(_Thing(f"the `content` {place}", (before, behind), True, part, part_required=is_last))
    if thoughts := [key for key in REASONING if message.get(key)]:
        mark = next(marks)
        copy |= {key: _marked(message[key], mark) for key in thoughts}
        name = f"the `{thoughts[0]}` {place}" if is_last else f"the `{thoughts[0]}` of earlier answers"
        things.append(_Thing(name, (mark,), is_last))
    for key in CALLS:
        if message.get(key):
            given = message[key]
            calls = given if isinstance(given, list) else [given]
            copies = [_marked_call(call, f"`{key}` {place}", marks, things) for call in calls]
            copy[key] = copies if isinstance(given, list) else copies[0]
    for key in message.keys() - UNWRITTEN:
        mark = next(marks)
        copy[key] = _marked(message[key], mark)
        if copy[key] != message[key]:
            things.append(_Thing(f"`{key}`", (mark,), False))
    return copy


def _marked_call(call: Json, place: str, marks: Iterator[str], things: list[_Thing]) -> Json:
    """A function call with marks, in OpenAI's form or without the ``function`` wrapper."""
    if not isinstance(call, Mapping):
        return call
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _marked_call(inner, place, marks, things)}
    own = {"name": next(marks), "arguments": next(marks)}
    copy = {key: _marked(value, own[key]) if key in own else value for key, value in call.items()}
    written = tuple(mark for key, mark in own.items() if copy.get(key) != call.get(key))
    things.append(_Thing(place, written, True, f"part of {place}", part_required=True))
    return copy


def _marked(value: Json, mark: str, spare: Sequence[str] = ()) -> Json:
    """``value`` with ``mark`` in every text and in place of every number.

    Values under the keys in ``spare`` are unchanged.
    """
    if isinstance(value, str):
        return f"{mark}{value}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(mark)
    if isinstance(value, Mapping):
        return {key: item if key in spare else _marked(item, mark, spare) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, mark, spare) for item in value]
    return value


def characters(value: Json) -> int:
    """The number of characters in all texts and keys of ``value``. Any other value counts as one."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + characters(item) for key, item in value.items())
    return sum(map(characters, value)) if isinstance(value, list | tuple) else 1
