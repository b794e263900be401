"""Encode preferences to token ids for trl's ``DPOTrainer`` and ``KTOTrainer``.

A side of a pair is encoded like a row of demonstrations. Its completion is everything from the first token of the
answer, including, as in trl, the text that the template writes after the answer.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rankwise.data.bad_rows import NEVER, check_bad_rows
from rankwise.data.encoding import Counts, Encoded, EncodedRow, RowEncoder, complain, list_column
from rankwise.data.rows import Problem, Rows
from rankwise.errors import warn

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

    A row loses its end at ``max_length``. A pair is left out where a side has nothing to learn from within it (RW216),
    or where both sides are the same within it (RW261).

    Raises DataError as ``encode_rows``.
    """
    encoder = RowEncoder(rows, tokenizer, chat_template)
    sides = [side for row in rows for side in row.sides]
    found = encoder.try_encode(sides, max_length)
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
    report = table.counts.report(name, encoder, problems, rows=len(table.labels), tokens=table.tokens)
    complain(report, rows, max_length)
    if table.equal:
        warn(
            "RW261",
            f"{table.equal} of {len(rows)} pairs of {rows.source} were left out: within --max-length {max_length} both "
            "sides are the same.",
        )
    if not table.paired and name == "train":
        _complain_of_labels(table.labels, rows.source)
    return Encoded(table.dataset(), report)


def _complain_of_labels(labels: Sequence[bool], source: str) -> None:
    """Warn where few batches could hold good and bad answers (RW262): they are taken in the order of the file."""
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
        self.tokens = self.equal = 0

    def add(self, sides: Sequence[EncodedRow], label: bool | None, stop_ids: set[int]) -> None:
        self.counts.lengths += [side.length for side in sides]
        self.counts.estimated += any(side.estimated for side in sides)
        ids = [side.ids[: self.max_length] for side in sides]
        start = min(map(completion_start, sides))
        if len(ids) == 2:
            # Some templates change the prompt with the answer: then the completions begin where the ids first differ.
            common = next((place for place, (a, b) in enumerate(zip(*ids)) if a != b), min(map(len, ids)))
            start = min(start, common)
        if any(completion_start(side) >= len(cut) for side, cut in zip(sides, ids)):
            self.counts.dropped += 1
            return
        if len(ids) == 2 and ids[0] == ids[1]:
            self.equal += 1
            return
        for (values, ends), piece in zip(self.columns.values(), [ids[0][:start], *(cut[start:] for cut in ids)]):
            values.extend(piece)
            ends.append(len(values))
        self.labels.append(bool(label))
        self.tokens += sum(map(len, ids))
        self.counts.trained += sum(len(cut) - start for cut in ids)
        self.counts.truncated += any(side.length > self.max_length for side in sides)
        self.counts.stopped += not stop_ids.isdisjoint(ids[0][start:])
        self.counts.split += any(side.split for side in sides)

    def dataset(self) -> Dataset:
        import pyarrow
        from datasets import Dataset

        columns = {name: list_column(*lists) for name, lists in self.columns.items()}
        marks = {} if self.paired else {"label": pyarrow.array(self.labels)}
        return Dataset(pyarrow.table({**columns, **marks}))
