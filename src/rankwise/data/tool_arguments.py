"""Give tool-call arguments the form that a chat template expects: an object, or its JSON text.

A template for objects quotes and escapes a text (Qwen 2.5, Llama 3.1) or refuses it. A template for texts writes an
object as Python does, or refuses it (DeepSeek).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from rankwise.data.left_out import function_of
from rankwise.data.rows import Message
from rankwise.errors import DataError
from rankwise.foreign import Fields, Json


def suit_arguments(messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> Sequence[Message]:
    """The conversation with its arguments in the form that the template writes as JSON, if there is one."""
    if not any(_forms(message) for message in messages):
        return messages
    others = [_in_the_other_form(message) for message in messages]
    try:
        fits = not _is_misread(messages, render(messages))
    except DataError:
        fits = False
    if fits:
        return messages
    try:
        return messages if _is_misread(others, render(others)) else others
    except DataError:
        return messages


def _is_misread(messages: Sequence[Message], text: str) -> bool:
    """Whether the template has quoted and escaped a text, or written an object in Python's spelling."""
    given = [arguments for message in messages for arguments, _ in _forms(message)]
    wrong = [_json(item) if isinstance(item, str) else str(item) for item in given]
    return any(spelt in text for item, spelt in zip(given, wrong) if spelt != _json(item) or isinstance(item, str))


def _forms(message: Message) -> list[tuple[Json, Json]]:
    """The arguments of each call, and the other form of them. Calls without an object of arguments are left out."""
    return [forms for call in message.get("tool_calls") or () if (forms := _both(function_of(call).get("arguments")))]


def _both(arguments: Json) -> tuple[Json, Json] | None:
    if isinstance(arguments, Mapping):
        return arguments, _json(arguments)
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        return None
    return (arguments, parsed) if isinstance(parsed, Mapping) else None


def _in_the_other_form(message: Message) -> Message:
    if not _forms(message):
        return message
    return {**message, "tool_calls": [_changed(call) for call in message["tool_calls"]]}


def _changed(call: Fields) -> Fields:
    forms = _both(function_of(call).get("arguments"))
    if forms is None:
        return call
    changed = {**function_of(call), "arguments": forms[1]}
    return {**call, "function": changed} if "function" in call else changed


def _json(value: Json) -> str:
    # As the filter tojson of transformers' templates writes it.
    return json.dumps(value, ensure_ascii=False)
