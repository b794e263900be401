"""The layouts of preferences: pairs of a better and a worse answer, and answers marked good or bad.

They are those of trl and of the hub's sets: plain text or messages, the prompt in a column of its own or, implicit, in
both answers. Each side becomes a row like any other, so it is written, checked and cut by the same rules.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Mapping

from rankwise.data.formats import (
    BadRow,
    Format,
    Record,
    found_in,
    message_list,
    text_field,
    tools_of,
)
from rankwise.data.rows import Message, Rows
from rankwise.foreign import JsonObject

SIDES = ("chosen", "rejected")
# {mark: whether the answer is good}; the numbers 1 and 0 equal True and False.
GOOD = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


class EqualSides(BadRow):
    """A pair whose sides are equal."""

    code = "RW260"


def unpaired(rows: Rows) -> Rows:
    """Each pair as a good and a bad answer; other rows as they are."""
    items = [dataclasses.replace(side, rejected=None) for row in rows for side in row.sides]
    return dataclasses.replace(rows, items=items)


def _two_sides(prompt: JsonObject, chosen: JsonObject, rejected: JsonObject) -> JsonObject:
    """The fields of the better row, which hold those of the worse one."""
    if chosen == rejected:
        raise EqualSides("expected `chosen` and `rejected` to differ, found the same answer in both")
    return {**prompt, **chosen, "label": True, "rejected": {**prompt, **rejected, "label": False}}


def _texts(column: str) -> Callable[[Record], JsonObject]:
    def fields(record: Record) -> JsonObject:
        better, worse = ({"completion": text_field(record, side)} for side in SIDES)
        return _two_sides({"prompt": text_field(record, column)}, better, worse)

    return fields


def _implicit_texts(record: Record) -> JsonObject:
    """The fields of a pair with an implicit prompt: the common prefix of both texts, without a trailing space."""
    better, worse = (text_field(record, side) for side in SIDES)
    length = _common(better, worse)
    if better[:length].endswith(" "):
        length -= 1
    if not better[:length].strip():
        raise BadRow("expected `chosen` and `rejected` to begin with the same prompt, found no common beginning")
    if better[length:] == worse[length:]:
        raise EqualSides("expected `chosen` and `rejected` to differ, found the same text in both")
    for side, text in zip(SIDES, (better, worse)):
        if not text[length:].strip():
            raise BadRow(f"expected an answer behind the common prompt in `{side}`, found none")
    return _two_sides({"prompt": better[:length]}, {"completion": better[length:]}, {"completion": worse[length:]})


def _conversations(record: Record) -> JsonObject:
    prompt = message_list(record, "prompt")
    better, worse = (_behind(prompt, _answer(record, side)) for side in SIDES)
    return _pair_of(record, prompt, better, worse)


def _implicit_conversations(record: Record) -> JsonObject:
    """The prompt is the messages that both conversations begin with, or a text in `prompt`."""
    better, worse = (message_list(record, side) for side in SIDES)
    length = _common(better, worse)
    if length == len(better) == len(worse):
        raise EqualSides("expected `chosen` and `rejected` to differ, found the same messages in both")
    if length == 0 and isinstance(record.get("prompt"), str):
        return _pair_of(record, ({"role": "user", "content": text_field(record, "prompt")},), better, worse)
    if length == 0:
        raise BadRow("expected `chosen` and `rejected` to begin with the same messages, found no common beginning")
    return _pair_of(record, better[:length], better[length:], worse[length:])


def _pair_of(
    record: Record, prompt: tuple[Message, ...], better: tuple[Message, ...], worse: tuple[Message, ...]
) -> JsonObject:
    for side, answer in zip(SIDES, (better, worse)):
        if not any(message["role"] == "assistant" for message in answer):
            raise BadRow(f"expected an `assistant` message in `{side}` behind the prompt, found none")
    common = {"tools": tools_of(record), "first_trained": len(prompt)}
    return _two_sides(common, {"messages": prompt + better}, {"messages": prompt + worse})


def _answer(record: Record, column: str) -> tuple[Message, ...]:
    if isinstance(record.get(column), str):
        return ({"role": "assistant", "content": text_field(record, column)},)
    return message_list(record, column)


def _behind(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """An answer without the prompt, which some data sets repeat in front of it."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _common(first: str | tuple[Message, ...], second: str | tuple[Message, ...]) -> int:
    """The length of the common prefix, in characters or messages."""
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(first, second)))


def _marked_text(record: Record) -> JsonObject:
    return {
        "prompt": text_field(record, "prompt"),
        "completion": text_field(record, "completion"),
        "label": _good(record),
    }


def _marked_conversation(record: Record) -> JsonObject:
    prompt = message_list(record, "prompt")
    answer = _behind(prompt, _answer(record, "completion"))
    if not any(message["role"] == "assistant" for message in answer):
        raise BadRow("expected an `assistant` message in `completion`, found none")
    fields = {"messages": prompt + answer, "first_trained": len(prompt), "tools": tools_of(record)}
    return {**fields, "label": _good(record)}


def _good(record: Record) -> bool:
    """Whether the answer is marked good: true or false, or 1 or 0."""
    value = record.get("label")
    value = value.strip().lower() if isinstance(value, str) else value
    if isinstance(value, list | dict) or value not in GOOD:
        found = found_in(record, "label") if not isinstance(value, str) else json.dumps(value)
        raise BadRow(f"expected true or false in `label`, found {found}")
    return GOOD[value]


PAIR_FORMATS = (
    Format(
        "pairs (prompt, chosen, rejected as messages)",
        "chat",
        ("prompt", *SIDES),
        _conversations,
        holds=list,
    ),
    Format(
        "pairs (chosen, rejected as messages)",
        "chat",
        SIDES,
        _implicit_conversations,
        optional=("prompt",),
        holds=list,
    ),
    Format("pairs (prompt, chosen, rejected)", "prompt", ("prompt", *SIDES), _texts("prompt")),
    Format("pairs (question, chosen, rejected)", "prompt", ("question", *SIDES), _texts("question"), separator="\n"),
    Format("pairs (chosen, rejected)", "prompt", SIDES, _implicit_texts),
)
MARKED_FORMATS = (
    Format(
        "marked answers (prompt, completion as messages, label)",
        "chat",
        ("prompt", "completion"),
        _marked_conversation,
        holds=list,
        marks=("label",),
    ),
    Format(
        "marked answers (prompt, completion, label)", "prompt", ("prompt", "completion"), _marked_text, marks=("label",)
    ),
)
# {objective: its layouts, in order}.
PREFERENCE_FORMATS: Mapping[str, Collection[Format]] = {
    "dpo": PAIR_FORMATS,
    "kto": (*MARKED_FORMATS, *PAIR_FORMATS),
}
