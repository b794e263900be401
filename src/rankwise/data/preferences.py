"""Encode preferences to token ids.

A side of a pair is encoded like a row of demonstrations. Its completion is everything from the first token of the
answer, including, as in trl, the text that the template writes after the answer.

The layouts of preferences: pairs of a better and a worse answer, and answers marked good or bad.

They are those of trl and of the hub's sets: plain text or messages, the prompt in a column of its own or, implicit, in
both answers. Each side becomes a row like any other, so it is written, checked and cut by the same rules.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from rankwise.data.encoding import Counts, Encoded, EncodedRow, RowEncoder, complain, list_column
from rankwise.data.formats import (
    BadRow,
    Format,
    Record,
    found_in,
    message_list,
    text_field,
    tools_of,
)
from rankwise.data.rows import NEVER, Message, Problem, Rows, check_bad_rows
from rankwise.errors import warn
from rankwise.foreign import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# From this number of rows, the order of labels is checked.
SORTED = 16
# The columns of trl's data sets: those of answers, and all of them by whether rows are pairs.
ANSWER_IDS = ("chosen_ids", "rejected_ids", "completion_ids")
COLUMNS = {True: ("prompt_ids", *ANSWER_IDS[:2]), False: ("prompt_ids", *ANSWER_IDS[2:])}


def completion_start(row: EncodedRow) -> int:
    """Where the answer starts; the length of the row where it has none."""
    return row.trained.index(True) if True in row.trained else len(row.ids)


def encode_preferences(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    chat_template: str | None = None,
    name: str = "train",
    skip_bad_rows: int | None = NEVER,
) -> Encoded:
    """Token ids of pairs, or of marked answers with their ``label``, by the rules of ``encode_rows``.

    A row loses its end at ``max_length``. A pair is left out where a side has nothing to learn from within it, or both
    sides are the same (RW216).

    Raises DataError as ``encode_rows``.
    """
    encoder = RowEncoder(rows, tokenizer, chat_template)
    sides = [side for row in rows for side in row.sides]
    found = encoder.try_encode(sides)
    table = _Table(max_length, paired=len(sides) > len(rows))
    problems: list[Problem] = []
    stop_ids: set[int] = set()
    for row in rows:
        encoded = [next(found) for _ in row.sides]
        bad = next((item for item in encoded if isinstance(item, Problem)), None)
        if bad is not None:
            problems.append(bad)
            continue
        stop_ids = stop_ids or encoder.stop_ids()
        table.add([item for item in encoded if isinstance(item, EncodedRow)], row.label, stop_ids)
    check_bad_rows(problems, len(rows), allowed=skip_bad_rows, before=len(rows.problems))
    problems = [*rows.problems, *problems]
    report = table.counts.report(name, encoder.template, problems, rows=len(table.labels), tokens=table.tokens)
    complain(report, rows, max_length)
    if not table.paired and name == "train":
        _complain_of_labels(table.labels, rows.source)
    return Encoded(table.dataset(), report)


def _complain_of_labels(labels: Sequence[bool], source: str) -> None:
    """Warn if few batches could hold good and bad answers (RW262): they are taken in the order of the file."""
    longest = max(len(list(run)) for _, run in itertools.groupby(labels))
    if len(set(labels)) == 1:
        kind = "good" if labels[0] else "bad"
        warn("RW262", f"all {len(labels)} answers of {source} are marked {kind}; KTO needs good and bad ones.")
    elif longest > len(labels) // 4 and len(labels) > SORTED:
        warn(
            "RW262",
            f"{source} has {longest} answers with one label in a row, of {len(labels)}, and KTO takes them in the "
            "order of the file; mix good and bad ones.",
        )


class _Table:
    """Grows the columns in flat int32 arrays."""

    def __init__(self, max_length: int, *, paired: bool) -> None:
        self.max_length = max_length
        self.columns = {name: (array("i"), array("i", [0])) for name in COLUMNS[paired]}
        self.labels: list[bool] = []
        self.paired = paired
        self.counts = Counts()
        self.tokens = 0

    def add(self, sides: Sequence[EncodedRow], label: bool | None, stop_ids: set[int]) -> None:
        self.counts.lengths += [side.length for side in sides]
        ids = [side.ids[: self.max_length] for side in sides]
        start = min(map(completion_start, sides))
        if len(ids) == 2:
            # Some templates change the prompt with the answer: then the completions begin where the ids first differ.
            common = next((place for place, (a, b) in enumerate(zip(*ids)) if a != b), min(map(len, ids)))
            start = min(start, common)
        is_idle = any(completion_start(side) >= len(cut) for side, cut in zip(sides, ids))
        if is_idle or (len(ids) == 2 and ids[0] == ids[1]):
            self.counts.dropped += 1
            return
        for (values, ends), piece in zip(self.columns.values(), [ids[0][:start], *(cut[start:] for cut in ids)]):
            values.extend(piece)
            ends.append(len(values))
        self.labels.append(bool(label))
        self.tokens += sum(map(len, ids))
        self.counts.trained += sum(len(cut) - start for cut in ids)
        self.counts.truncated += any(side.length > self.max_length for side in sides)
        self.counts.stopped += not stop_ids.isdisjoint(ids[0][start:])

    def dataset(self) -> Dataset:
        import pyarrow
        from datasets import Dataset

        columns = {name: list_column(*lists) for name, lists in self.columns.items()}
        marks = {} if self.paired else {"label": pyarrow.array(self.labels)}
        return Dataset(pyarrow.table({**columns, **marks}))


SIDES = ("chosen", "rejected")
# {mark: whether the answer is good}; the numbers 1 and 0 equal True and False.
GOOD = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def unpaired(rows: Rows) -> Rows:
    """Each pair as a good and a bad answer; other rows as they are."""
    items = [dataclasses.replace(side, rejected=None) for row in rows for side in row.sides]
    return dataclasses.replace(rows, items=items)


def _two_sides(prompt: JsonObject, chosen: JsonObject, rejected: JsonObject) -> JsonObject:
    """The fields of the better row, which hold those of the worse one."""
    if chosen == rejected:
        raise BadRow("expected `chosen` and `rejected` to differ, found the same answer in both")
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
        raise BadRow("expected `chosen` and `rejected` to differ, found the same text in both")
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
        raise BadRow("expected `chosen` and `rejected` to differ, found the same messages in both")
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
