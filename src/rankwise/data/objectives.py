"""Rows of other objectives than demonstrations: preferences, prompts for generation, and texts with labels.

Their layouts are those of trl and of the hub's sets. Each row is written, checked and cut by the rules of
`rankwise.data.encoding`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from rankwise.data.encoding import Counts, Encoded, EncodedRow, RowEncoder, complain, list_column
from rankwise.data.formats import (
    BadRow,
    Format,
    Record,
    conversation,
    encodable,
    found_in,
    is_number,
    message_list,
    text_field,
    tools_of,
)
from rankwise.data.rows import NEVER, Message, Problem, Row, Rows
from rankwise.errors import DataError, some_of, warn
from rankwise.foreign import Fields, JsonObject
from rankwise.labels import NUMBER, SEVERAL, SINGLE, Labels, Target
from rankwise.objectives import OBJECTIVES, ObjectiveName

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Preferences: pairs of a better and a worse answer, and answers marked good or bad; the prompt in a column of its own
# or, implicit, in both answers. A completion is everything from the first token of the answer, including, as in trl,
# the text that the template writes after the answer.

# From this number of rows, the order of labels is checked.
SORTED = 16
# The columns of trl's data sets: those of answers, and all of them by whether rows are pairs.
ANSWER_IDS = ("chosen_ids", "rejected_ids", "completion_ids")
COLUMNS = {True: ("prompt_ids", *ANSWER_IDS[:2]), False: ("prompt_ids", *ANSWER_IDS[2:])}


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
    kept = len(table.labels)
    report = table.counts.report(name, encoder.template, rows, problems, skip_bad_rows, kept=kept, tokens=table.tokens)
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
        start = min(side.start for side in sides)
        if len(ids) == 2:
            # Some templates change the prompt with the answer: then the completions begin where the ids first differ.
            start = min(start, _common(*ids))
        is_idle = any(side.start >= len(cut) for side, cut in zip(sides, ids))
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
    """Each pair as a good and a bad answer, beside other prompts' for KTO's z; other rows as they are."""
    sides, half = [row.sides for row in rows], len(rows) // 2
    mixed = (side for number, own in enumerate(sides) for side in (own[0], *sides[number - half][1:]))
    items = [dataclasses.replace(side, rejected=None) for side in mixed]
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


def _common(first: Sequence[object], second: Sequence[object]) -> int:
    """The length of the common prefix."""
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
        name="pairs (prompt, chosen, rejected as messages)",
        kind="chat",
        columns=("prompt", *SIDES),
        fields=_conversations,
        holds=list,
    ),
    Format(
        name="pairs (chosen, rejected as messages)",
        kind="chat",
        columns=SIDES,
        fields=_implicit_conversations,
        optional=("prompt",),
        holds=list,
    ),
    Format(name="pairs (prompt, chosen, rejected)", kind="prompt", columns=("prompt", *SIDES), fields=_texts("prompt")),
    Format(
        name="pairs (question, chosen, rejected)",
        kind="prompt",
        columns=("question", *SIDES),
        fields=_texts("question"),
        separator="\n",
    ),
    Format(name="pairs (chosen, rejected)", kind="prompt", columns=SIDES, fields=_implicit_texts),
)
MARKED_FORMATS = (
    Format(
        name="marked answers (prompt, completion as messages, label)",
        kind="chat",
        columns=("prompt", "completion"),
        fields=_marked_conversation,
        holds=list,
        marks=("label",),
    ),
    Format(
        name="marked answers (prompt, completion, label)",
        kind="prompt",
        columns=("prompt", "completion"),
        fields=_marked_text,
        marks=("label",),
    ),
)

# Prompts for generation. A row is a row of training data whose answer is PLACE, so that prompts are formatted as in
# training. The right answer in the data is for rewards, like all other columns.

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
    return (
        Format(
            name=f"prompts ({', '.join(columns)})",
            kind="prompt",
            columns=columns,
            fields=_named(prompt_column, completion_column),
        ),
    )


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
    Format(
        name="prompts (messages)",
        kind="chat",
        columns=("messages",),
        fields=_messages("messages"),
        optional=("system",),
    ),
    Format(
        name="prompts (prompt as messages)", kind="chat", columns=("prompt",), fields=_messages("prompt"), holds=list
    ),
    Format(name="prompts (prompt)", kind="prompt", columns=("prompt",), fields=_text("prompt", "completion")),
    Format(
        name="prompts (instruction, input)",
        kind="prompt",
        columns=("instruction",),
        fields=_instruction,
        separator="\n",
        optional=("input", "context"),
    ),
    Format(
        name="prompts (question)", kind="prompt", columns=("question",), fields=_text("question", None), separator="\n"
    ),
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
        ids = item.ids[: item.start]
        counts.lengths.append(len(ids))
        if len(ids) > max_length - room:
            counts.dropped += 1
        else:
            kept.append({"input_ids": ids, "asked": _asked(row, names)})
            tokens += len(ids)
    report = counts.report(name, encoder.template, rows, problems, skip_bad_rows, kept=len(kept), tokens=tokens)
    _tell_of_long(rows, len(counts.lengths), len(kept), max_length, room)
    return Encoded(Dataset.from_list(kept), report)


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


# Texts with labels.

# A step moves an answer by at most the learning rate times the sum of the last hidden state, which is about 1.
LARGEST_NUMBER = 1000
KINDS = {tuple: "a list", str: "text", int: "a number", float: "a number"}


def _target(record: Record) -> Target:
    value = record.get("label")
    if isinstance(value, list) and all(isinstance(name, str | int) for name in value):
        return tuple(_name(name) for name in value)
    if is_number(value):
        # pandas and parquet write whole numbers as 1.0 where a row of the column once had none.
        return int(value) if value == int(value) else float(value)
    if isinstance(value, bool) or (isinstance(value, str) and value.strip()):
        return encodable(_name(value), "`label`")
    raise BadRow(f"expected a label in `label`, found {found_in(record, 'label')}")


def _name(value: str | int) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _text_or_pair(record: Record) -> JsonObject:
    """The fields of a row; a second text is in ``completion``."""
    pair = {"completion": text_field(record, "text_pair")} if record.get("text_pair") else {}
    return {"text": text_field(record, "text"), **pair}


def _labelled(record: Record) -> JsonObject:
    return {**_text_or_pair(record), "target": _target(record)}


def _perhaps_labelled(record: Record) -> JsonObject:
    return _labelled(record) if record.get("label") not in (None, "") else _text_or_pair(record)


LABELLED = (
    Format(
        name="text with a label (text, label)",
        kind="text",
        columns=("text",),
        fields=_labelled,
        uses_template=False,
        optional=("text_pair",),
        marks=("label",),
    ),
)
# Texts to be answered, whose labels, if there are any, are compared with the answers.
UNANSWERED = (
    Format(
        name="text (text)",
        kind="text",
        columns=("text",),
        fields=_perhaps_labelled,
        uses_template=False,
        optional=("text_pair", "label"),
    ),
)


# {what a row of the data is: its layouts, in order}.
FORMATS: Mapping[str, Collection[Format]] = {
    "pair": PAIR_FORMATS,
    "mark": (*MARKED_FORMATS, *PAIR_FORMATS),
    "prompt": PROMPTS,
    "label": LABELLED,
}


def formats_of(
    objective: ObjectiveName, prompt_column: str | None = None, completion_column: str | None = None
) -> Collection[Format] | None:
    """The data formats of an objective, with the columns of prompts if they are named; None for demonstrations."""
    facts = OBJECTIVES[objective]
    return prompt_formats(prompt_column, completion_column) if facts.of_rewards else FORMATS.get(facts.rows)


def labels_in(rows: Rows) -> Labels:
    """The labels of training rows: names and whole numbers sorted, so that the order of rows does not matter; a number
    where some label is a fraction; several where labels are lists.

    Raises DataError: RW203 for labels of several types and numbers above LARGEST_NUMBER, RW214 if all rows have the
    same one.
    """
    targets = [row.target for row in rows if row.target is not None]
    kinds = Counter(KINDS[type(target)] for target in targets)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} in {count:,} row{'s' * (count > 1)}" for kind, count in kinds.items())
        raise DataError("RW203", f"{rows.source} has labels of several types ({found}); write all as one type.")
    if any(isinstance(target, float) for target in targets):
        if (most := max(abs(target) for target in targets if isinstance(target, int | float))) > LARGEST_NUMBER:
            raise DataError(
                "RW203",
                f"{rows.source} has numbers as labels up to {most:,.6g}, which a new head does not reach from 0; "
                f"divide all of them, so that they lie within {LARGEST_NUMBER:,}.",
            )
        return Labels(("value",), NUMBER)
    lists = [target for target in targets if isinstance(target, tuple)]
    names = sorted({name for target in lists for name in target}) if lists else map(str, sorted(set(targets)))
    labels = Labels(tuple(names), SEVERAL if lists else SINGLE)
    if len(set(targets)) < 2:
        raise DataError(
            "RW214",
            f"all {len(rows)} rows of {rows.source} have the same label ({targets[0]!r}), so there is nothing to "
            "learn; give rows with other labels, too.",
        )
    return labels


def label_counts(rows: Rows, labels: Labels) -> dict[str, int]:
    """{label: number of rows}, the most frequent first; empty for numbers."""
    if labels.problem == NUMBER:
        return {}
    each = (row.target if isinstance(row.target, tuple) else (str(row.target),) for row in rows)
    return dict(Counter(name for names in each for name in names).most_common())


def encode_labelled(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    *,
    max_length: int,
    name: str = "train",
    skip_bad_rows: int | None = NEVER,
) -> Encoded:
    """Token ids as the tokenizer gives them, special tokens included, and ``label``, None if a row has none.

    Raises DataError (RW203) for labels that are not among ``labels``. Warns of rows that were cut (RW215).
    """
    import datasets

    problems, counts, columns = unknown_labels(rows, labels), Counts(), []
    unknown = {problem.place for problem in problems}
    for row in rows:
        if row.place in unknown:
            continue
        label = None if row.target is None else labels.number(row.target)
        pair = row.completion or None
        encoded = tokenizer(row.text, pair, truncation=True, max_length=max_length)
        ids, length = encoded["input_ids"], len(encoded["input_ids"])
        if length == max_length:
            length = len(tokenizer(row.text, pair, verbose=False)["input_ids"])
        kinds = {"token_type_ids": encoded["token_type_ids"]} if "token_type_ids" in encoded else {}
        columns.append({"input_ids": ids, **kinds, "label": label})
        counts.lengths.append(length)
    counts.trained, counts.truncated = len(columns), sum(length > max_length for length in counts.lengths)
    tokens, template = sum(len(row["input_ids"]) for row in columns), "no template: the text as it is"
    report = counts.report(name, template, rows, problems, skip_bad_rows, kept=len(columns), tokens=tokens)
    if counts.truncated:
        warn(
            "RW215",
            f"{counts.truncated} of {len(rows)} rows of {rows.source} were cut at --max-length {max_length} and lost "
            f"their end (the longest has {max(counts.lengths):,} tokens).",
            stacklevel=3,
        )
    return Encoded(datasets.Dataset.from_list(columns), report)


def unknown_labels(rows: Rows, labels: Labels) -> list[Problem]:
    """The rows whose label is not among ``labels``."""
    found = []
    for row in rows:
        try:
            if row.target is not None:
                labels.number(row.target)
        except ValueError:
            why = f"expected one of the known labels ({some_of(labels.names)}), found {row.target!r}"
            found.append(Problem(source=row.source, line=row.line, counted_in=row.counted_in, code="RW203", why=why))
    return found
