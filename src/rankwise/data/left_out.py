"""Find the parts of a row that a chat template omits: each part's words must stand in the rendered text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rankwise.data.rows import Message
from rankwise.foreign import Fields, Json

# transformers' type of tools.
Tools = list[Any] | None
# Names for the reasoning of a message; transformers passes the first two to every template.
REASONING = ("reasoning_content", "thinking", "reasoning")
CALLS = ("tool_calls", "function_call")
# Fields that are checked separately, and names and ids that many templates do not use.
UNWRITTEN = {"role", "content", "name", "id", "tool_call_id", *REASONING, *CALLS}
# Templates trim and indent, and write text as JSON.
REWRITTEN = re.compile(r"\\[nrt]|[\s\\]")
# What may stand between reasoning inside the ``content`` and the answer.
END_OF_THOUGHT = re.compile(r"</[^<>]*>|\n")


@dataclasses.dataclass(frozen=True)
class Unwritten:
    """The parts that a template omits, in words: those required for training, and optional ones."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def left_out(messages: Sequence[Message], tools: Tools, text: str) -> Unwritten:
    """The parts of a conversation whose words are missing in its ``text``.

    A required part must occur as often as in all required parts together, since a short one can stand in another.
    """
    written = _plain(text)
    required: list[tuple[str, str]] = []
    optional: list[tuple[str, str]] = []
    for name, is_required, value in _parts(messages, tools, written):
        (required if is_required else optional).extend((name, words) for words in map(_plain, _texts(value)) if words)
    expected = "\0".join(words for _, words in required if words in written)
    lost = [name for name, words in required if written.count(words) < max(1, expected.count(words))]
    spare = [name for name, words in optional if words not in written]
    return Unwritten(tuple(dict.fromkeys(lost)), tuple(dict.fromkeys(spare)))


def _parts(messages: Sequence[Message], tools: Tools, written: str) -> Iterator[tuple[str, bool, Json]]:
    """(name, whether it is required, value) of each part. Templates may drop the reasoning of earlier answers."""
    yield from (("`tools`", True, function_of(tool).get("name")) for tool in tools or ())
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index, message in enumerate(messages):
        place, is_earlier = f"of message {index + 1}", index in answers[:-1]
        content = message["content"]
        answer = END_OF_THOUGHT.split(content.strip())[-1]
        if is_earlier and _plain(content) not in written and _plain(answer) in written:
            yield "part of the `content` of earlier answers", False, content
            content = answer
        yield f"the `content` {place}", True, content
        if thought := next((key for key in REASONING if message.get(key)), None):
            whose = "of earlier answers" if is_earlier else place
            yield f"the `{thought}` {whose}", not is_earlier, message[thought]
        for key in CALLS:
            calls = message.get(key) or ()
            for call in [calls] if isinstance(calls, Mapping) else calls:
                yield f"`{key}` {place}", True, [function_of(call).get(part) for part in ("name", "arguments")]
        yield from ((f"`{key}`", False, message[key]) for key in message if key not in UNWRITTEN)


def function_of(call: Json) -> Fields:
    """The part that names the function: the call itself, or its `function` field in OpenAI's form."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _texts(value: Json) -> Iterator[str]:
    """All texts and numbers in a value of JSON. Templates spell true and null in several ways."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _plain(text: str) -> str:
    return REWRITTEN.sub("", text)
