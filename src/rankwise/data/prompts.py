"""Prompts for generation: the layouts of their rows, and their token ids up to the start of an answer.

A row is a row of training data whose answer is PLACE, so that prompts are formatted as in training. The right answer in
the data is for rewards, like all other columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from rankwise.data.encoding import Counts, Encoded, RowEncoder
from rankwise.data.formats import BadRow, Format, Record, conversation, is_number, text_field, tools_of
from rankwise.data.rows import Problem, Row, Rows, check_bad_rows
from rankwise.errors import DataError, warn
from rankwise.foreign import Fields, JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "answer"
# Columns in which rewards look for the right answer, the first that is there.
ANSWERS = ("answer", "solution")


def prompt_formats(prompt_column: str | None = None, completion_column: str | None = None) -> Collection[Format]:
    """The layouts of prompts; the one of these columns if they are named. Raises DataError (RW207) for a
    ``completion_column`` without the other.
    """
    if prompt_column is None:
        if completion_column is not None:
            raise DataError("RW207", "--completion-column goes with --prompt-column; give both.")
        return PROMPTS
    columns = tuple(name for name in (prompt_column, completion_column) if name)
    return (Format(f"prompts ({', '.join(columns)})", "prompt", columns, _named(prompt_column, completion_column)),)


def _named(prompt: str, completion: str | None) -> Callable[[Record], JsonObject]:
    """A reader of named columns. The named completion is the right answer, also where others look like one."""

    def fields(record: Record) -> JsonObject:
        known = {} if completion is None else {ANSWERS[0]: text_field(record, completion)}
        return {"prompt": text_field(record, prompt), "completion": PLACE, "columns": {**record, **known}}

    return fields


def _text(prompt: str, completion: str | None) -> Callable[[Record], JsonObject]:
    def fields(record: Record) -> JsonObject:
        known = None if completion is None else record.get(completion)
        return {"prompt": text_field(record, prompt), "completion": PLACE, "columns": _with_answer(record, known)}

    return fields


def _instruction(record: Record) -> JsonObject:
    prompt, known = text_field(record, "instruction"), record.get("output", record.get("response"))
    context = next((name for name in ("input", "context") if str(record.get(name) or "").strip()), None)
    if context is not None:
        prompt = f"{prompt}\n\n{text_field(record, context)}"
    return {"prompt": prompt, "completion": PLACE, "columns": _with_answer(record, known)}


def _messages(column: str) -> Callable[[Record], JsonObject]:
    """A reader of a conversation to continue. An assistant's message at its end is the right answer."""

    def fields(record: Record) -> JsonObject:
        messages = conversation({**record, "messages": record[column]})
        known = record.get("completion")
        if messages[-1]["role"] == "assistant":
            messages, known = messages[:-1], messages[-1]["content"]
        if not messages:
            raise BadRow(f"expected a message of the user in `{column}`, found only the assistant's")
        return {
            "messages": (*messages, {"role": "assistant", "content": PLACE}),
            "tools": tools_of(record),
            "first_trained": len(messages),
            "columns": _with_answer(record, known),
        }

    return fields


def _with_answer(record: Record, known: object) -> Fields:
    """The record with the right answer ``known`` in a column that rewards read, unless it has such a column."""
    if isinstance(known, list) and known and isinstance(known[-1], Mapping):
        known = known[-1].get("content")
    has_one = any(name in record for name in ANSWERS)
    is_one = isinstance(known, str) or is_number(known)
    return record if has_one or not is_one else {**record, ANSWERS[0]: str(known)}


# In order, as those of training data.
PROMPTS: Collection[Format] = (
    Format("prompts (messages)", "chat", ("messages",), _messages("messages"), optional=("system",)),
    Format("prompts (prompt as messages)", "chat", ("prompt",), _messages("prompt"), holds=list),
    Format("prompts (prompt)", "prompt", ("prompt",), _text("prompt", "completion")),
    Format(
        "prompts (instruction, input)",
        "prompt",
        ("instruction",),
        _instruction,
        separator="\n",
        optional=("input", "context"),
    ),
    Format("prompts (question)", "prompt", ("question",), _text("question", None), separator="\n"),
)


def encode_prompts(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    *,
    room: int,
    chat_template: str | None = None,
    name: str = "train",
    skip_bad_rows: int | None = None,
) -> Encoded:
    """Encode prompts: columns ``input_ids``, the ids, and ``asked``, JSON for the rewards: ``{"prompt": ..., "columns":
    {...}}``. Prompts without ``room`` for an answer of so many tokens are left out, counted and warned of (RW216).

    Raises DataError: RW214 if no prompt is left; otherwise as ``encode_rows``.
    """
    from datasets import Dataset

    encoder = RowEncoder(rows, tokenizer, chat_template)
    problems, counts, kept, tokens = [], Counts(), [], 0
    names = [name for name in dict.fromkeys(name for row in rows for name in row.columns or ()) if name != "prompt"]
    for row, item in zip(rows, encoder.try_encode(rows.items)):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        ids = item.ids[: item.trained.index(True)]
        counts.lengths.append(len(ids))
        if len(ids) > max_length - room:
            counts.dropped += 1
        else:
            kept.append({"input_ids": ids, "asked": _asked(row, names)})
            tokens += len(ids)
    check_bad_rows(problems, len(rows), allowed=skip_bad_rows, before=len(rows.problems))
    _tell_of_long(rows, len(counts.lengths), len(kept), max_length, room)
    bad = [*rows.problems, *problems]
    return Encoded(Dataset.from_list(kept), counts.report(name, encoder.template, bad, rows=len(kept), tokens=tokens))


def _asked(row: Row, names: Sequence[str]) -> str:
    """JSON, since a column may hold values of several types; each row has each column, as trl's rewards expect."""
    columns = row.columns or {}
    prompt = list(row.messages[: row.first_trained]) if row.kind == "chat" else row.prompt
    return json.dumps({"prompt": prompt, "columns": {name: columns.get(name) for name in names}}, default=str)


def _tell_of_long(rows: Rows, count: int, kept: int, max_length: int, room: int) -> None:
    if not kept:
        raise DataError(
            "RW214",
            f"none of the {count:,} prompts of {rows.source} fits into the {max_length - room:,} tokens that "
            f"--max-length {max_length} leaves beside {room} of an answer; raise --max-length.",
        )
    if kept < count:
        warn(
            "RW216",
            f"{count - kept:,} of {count:,} prompts of {rows.source} have more than the {max_length - room:,} tokens "
            f"that --max-length {max_length} leaves beside {room} of an answer; they are left out.",
        )
