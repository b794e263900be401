"""Rows to token ids and labels for trl's ``SFTTrainer``.

Legend: ``ids`` are a row's token ids, ``trained`` one truth value per id, ``labels`` the id where trained, else -100.
A row is tokenized as one text. Where that would put one token across the border of prompt and answer, the pieces
are tokenized apart, so that training sees the prompt's ids exactly as generation will.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rankwise.data.rows import Row, Rows
from rankwise.data.templates import ChatRenderer, Rendered, Segment, renderer
from rankwise.errors import DataError, warn

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
ROWS_PER_BATCH = 2000


@dataclasses.dataclass(frozen=True)
class EncodingReport:
    """What became of the rows. Lengths in tokens."""

    name: str
    rows: int
    # Rows of the encoded data set: those read, less the dropped ones.
    tokens: int
    trained_tokens: int
    # Tokens in the loss; both figures after truncation.
    truncated_rows: int
    # Kept, but cut at max_length.
    dropped_rows: int
    # Nothing to train on within max_length.
    longest: int
    median_length: float
    # Both of the rows before truncation.
    template: str
    # How rows were written: "chat template (the tokenizer's)", "no template: prompt + completion", ...
    stop_token_rows: int
    # Kept rows with a stop token in the labels.
    split_rows: int = 0
    # Kept rows whose pieces were tokenized apart, because a token would have crossed from prompt to answer.

    @property
    def trained_share(self) -> float:
        """Share of the tokens that is in the loss, 0 to 1."""
        return self.trained_tokens / self.tokens


@dataclasses.dataclass(frozen=True)
class Encoded:
    """``dataset`` has the int32 list columns ``input_ids`` and ``labels`` of equal lengths, at most max_length."""

    dataset: Dataset
    report: EncodingReport


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row before truncation."""

    ids: list[int]
    trained: list[bool]
    split: bool


class RowEncoder:
    """Tokenizes rows of one kind. ``template`` names the way they are written; ``stop_ids`` end an answer."""

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase | None, chat_template: str | None) -> None:
        if tokenizer is None:
            raise DataError("RW219", "the model comes without a tokenizer, so text cannot be encoded for it.")
        self.tokenizer = tokenizer
        self.template, self._render = renderer(rows, tokenizer, chat_template)
        self._opening = _opening_ids(tokenizer)

    def stop_ids(self) -> set[int]:
        stop = self._render.stop if isinstance(self._render, ChatRenderer) else None
        token: Any = self.tokenizer.eos_token_id if stop is None else self.tokenizer.convert_tokens_to_ids(stop)
        return {token}

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Ids of some rows, tokenized as one batch."""
        rendered = [self._render(row) for row in rows]
        pieces = tokenize_segments(self._ids, [item.segments for item in rendered])
        return [self._framed(*piece, item) for piece, item in zip(pieces, rendered)]

    def _framed(self, ids: list[int], trained: list[bool], split: bool, rendered: Rendered) -> EncodedRow:
        if rendered.opened:
            ids, trained = self._opening + ids, [False] * len(self._opening) + trained
        if rendered.closed:
            ids, trained = [*ids, self.tokenizer.eos_token_id], [*trained, True]
        return EncodedRow(ids, trained, split)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # Several rows often share a prompt: E2E's are asked eight times each.
        distinct = list(dict.fromkeys(texts))
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids = dict(zip(distinct, self.tokenizer(distinct, verbose=False, **options)["input_ids"]))
        return [ids[text] for text in texts]


def encode_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    chat_template: str | None = None,
    name: str = "train",
) -> Encoded:
    """Token ids and labels of all rows; only completions or assistant turns, each with its stop token, are trained.

    ``chat_template`` is Jinja text and replaces the tokenizer's. Rows longer than ``max_length`` lose their end; a
    row that then has nothing to train on is dropped. Both are counted, and warned of (RW215, RW216).

    Raises DataError: RW210 chat rows without a template, RW211 the template refuses a row, RW212 it does not tell
    the assistant's text apart, RW213 no stop token, RW214 nothing left to train on, RW219 no tokenizer.
    """
    encoder = RowEncoder(rows, tokenizer, chat_template)
    table = _Table(max_length)
    for start in range(0, len(rows), ROWS_PER_BATCH):
        encoded = encoder.encode(rows.items[start : start + ROWS_PER_BATCH])
        stop_ids = encoder.stop_ids()
        for row in encoded:
            table.add(row, stop_ids)
    report = table.report(name, encoder.template)
    _complain(report, rows, max_length)
    return Encoded(table.dataset(), report)


def _complain(report: EncodingReport, rows: Rows, max_length: int) -> None:
    if report.rows == 0:
        raise DataError(
            "RW214",
            f"none of the {len(rows)} rows of {rows.source} has a token to train on within --max-length {max_length}"
            f" (the median row has {report.median_length:.0f} tokens); raise it.",
        )
    if report.truncated_rows:
        warn(
            "RW215",
            f"{report.truncated_rows} of {len(rows)} rows of {rows.source} were cut at --max-length {max_length} and "
            f"lost their end, the stop token included (the longest has {report.longest} tokens).",
            stacklevel=3,
        )
    if report.dropped_rows:
        warn(
            "RW216",
            f"{report.dropped_rows} of {len(rows)} rows of {rows.source} were left out: their prompt alone fills "
            f"--max-length {max_length}.",
            stacklevel=3,
        )


class _Table:
    """Grows the two columns in flat int32 arrays: a tenth of the memory of lists of lists."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.ids, self.labels, self.ends = array("i"), array("i"), array("i", [0])
        self.lengths: list[int] = []
        self.trained = self.truncated = self.dropped = self.stopped = self.split = 0

    def add(self, row: EncodedRow, stop_ids: set[int]) -> None:
        ids, trained = row.ids[: self.max_length], row.trained[: self.max_length]
        self.lengths.append(len(row.ids))
        if not any(trained):
            self.dropped += 1
            return
        labels = [token if is_trained else IGNORED for token, is_trained in zip(ids, trained)]
        self.ids.extend(ids)
        self.labels.extend(labels)
        self.ends.append(len(self.ids))
        self.trained += sum(trained)
        self.truncated += len(row.ids) > self.max_length
        self.stopped += not stop_ids.isdisjoint(labels)
        self.split += row.split

    def report(self, name: str, template: str) -> EncodingReport:
        return EncodingReport(
            name=name,
            rows=len(self.ends) - 1,
            tokens=len(self.ids),
            trained_tokens=self.trained,
            truncated_rows=self.truncated,
            dropped_rows=self.dropped,
            longest=max(self.lengths, default=0),
            median_length=statistics.median(self.lengths) if self.lengths else 0,
            template=template,
            stop_token_rows=self.stopped,
            split_rows=self.split,
        )

    def dataset(self) -> Dataset:
        import pyarrow
        from datasets import Dataset

        ends = pyarrow.array(self.ends, type=pyarrow.int32())
        columns = {"input_ids": self.ids, "labels": self.labels}
        lists = {
            name: pyarrow.ListArray.from_arrays(
                ends, pyarrow.Array.from_buffers(pyarrow.int32(), len(values), [None, pyarrow.py_buffer(values)])
            )
            for name, values in columns.items()
        }
        return Dataset(pyarrow.table(lists))


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of every text (a BOS token), found by looking; what it puts behind is ours."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


Pieces = tuple[list[int], list[bool], bool]


def tokenize_segments(
    tokenize: Callable[[list[str]], list[list[int]]], rows: Sequence[Sequence[Segment]]
) -> Iterator[Pieces]:
    """Per row its ids, which of them are trained, and whether its segments had to be tokenized apart.

    ``tokenize`` takes texts to ids without special tokens; it needs no offsets, so slow tokenizers do too.
    """
    whole = tokenize(["".join(segment.text for segment in row) for row in rows])
    parts = iter(tokenize([segment.text for row in rows for segment in row]))
    for row, ids in zip(rows, whole):
        own_parts = list(itertools.islice(parts, len(row)))
        yield _aligned(tokenize, row, ids, own_parts)


def _aligned(
    tokenize: Callable[[list[str]], list[list[int]]],
    row: Sequence[Segment],
    ids: list[int],
    parts: list[list[int]],
) -> Pieces:
    apart = list(itertools.chain.from_iterable(parts))
    lengths = [len(part) for part in parts]
    if apart == ids:
        return ids, _mask(row, lengths), False
    # Tokenizers that mark the start of a text (SentencePiece) tokenize a later piece differently when it stands
    # alone; then the lengths of the growing prefixes tell where the pieces end.
    prefixes = tokenize(list(itertools.accumulate(segment.text for segment in row[:-1]))) if len(row) > 1 else []
    if all(ids[: len(prefix)] == prefix for prefix in prefixes):
        ends = [0, *(len(prefix) for prefix in prefixes), len(ids)]
        return ids, _mask(row, [end - start for start, end in itertools.pairwise(ends)]), False
    return apart, _mask(row, lengths), True


def _mask(row: Sequence[Segment], lengths: Sequence[int]) -> list[bool]:
    mask: list[bool] = []
    for segment, length in zip(row, lengths):
        mask += [segment.trained] * length
    return mask
