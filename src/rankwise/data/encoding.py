"""Encode rows to token ids and labels, and show one row as the model sees it.

Legend: ``ids`` are a row's token ids, ``trained`` one boolean per id, ``labels`` the id where trained, else -100. A row
is tokenized as one text. If one token would cross the border of prompt and answer, the pieces are tokenized
separately, so that the prompt's ids in training equal those in generation.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rankwise.constants import IGNORED
from rankwise.data.rows import NEVER, Problem, Row, Rows, check_bad_rows
from rankwise.data.templates import ChatRenderer, Rendered, RowRefused, Segment, renderer
from rankwise.errors import ConfigError, DataError, warn

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ListArray
    from transformers import PreTrainedTokenizerBase

# Rows are tokenized in batches, each ended by the first of these bounds.
ROWS_PER_BATCH = 2000
CHARACTERS_PER_BATCH = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodingReport:
    """Counts and lengths of the encoded rows. Lengths are in tokens."""

    name: str
    # Number of rows of the encoded data set: those read, minus the dropped ones.
    rows: int
    # Number of tokens after truncation.
    tokens: int
    # Number of tokens in the loss.
    trained_tokens: int
    # Number of kept rows that were cut at max_length.
    truncated_rows: int
    # Number of rows without a trained token within max_length.
    dropped_rows: int
    # Lengths before truncation.
    longest: int
    median_length: float
    # How rows were formatted: "chat template (the tokenizer's)", "no template: prompt + completion", ...
    template: str
    # Number of kept rows with a stop token in the labels.
    stop_token_rows: int
    skipped_rows: int = 0
    # Bad rows that were left out: {"row", "code", "why"}.
    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)

    @property
    def trained_share(self) -> float:
        """The share of the tokens that is in the loss, between 0 and 1."""
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

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def start(self) -> int:
        """Where the answer starts; the length of the row where it has none."""
        return self.trained.index(True) if True in self.trained else self.length


class RowEncoder:
    """Tokenizes rows. ``template`` names how they are formatted."""

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase | None, chat_template: str | None) -> None:
        if tokenizer is None:
            raise ConfigError("RW115", "the model has no tokenizer to encode text with; add its tokenizer files.")
        self.tokenizer = tokenizer
        self.template, self._render = renderer(rows, tokenizer, chat_template)
        self._opening = _opening_ids(tokenizer)

    def stop_ids(self) -> set[int]:
        stop = self._render.stop if isinstance(self._render, ChatRenderer) else None
        return {self.tokenizer.eos_token_id if stop is None else self._ids([stop])[0][-1]}

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Token ids of some rows, uncut. Raises DataError, which names the refused rows."""
        found = list(self.try_encode(rows))
        problems = [item for item in found if isinstance(item, Problem)]
        check_bad_rows(problems, len(rows))
        return [item for item in found if isinstance(item, EncodedRow)]

    def try_encode(self, rows: Sequence[Row]) -> Iterator[EncodedRow | Problem]:
        """Encode each row, or return the Problem with it."""
        for batch in _batches(_rendered_or_not(self._render, row) for row in rows):
            texts = [item for item in batch if isinstance(item, Rendered)]
            pieces = tokenize_segments(self._ids, [item.segments for item in texts])
            for item in batch:
                yield self._framed(*next(pieces), item) if isinstance(item, Rendered) else item

    def _framed(self, ids: list[int], trained: list[bool], rendered: Rendered) -> EncodedRow:
        if rendered.opened:
            ids, trained = self._opening + ids, [False] * len(self._opening) + trained
        if rendered.closed:
            ids, trained = [*ids, self.tokenizer.eos_token_id], [*trained, True]
        return EncodedRow(ids, trained)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # Several rows often share a prompt: E2E's are asked eight times each.
        distinct = list(dict.fromkeys(texts))
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids = dict(zip(distinct, self.tokenizer(distinct, verbose=False, **options)["input_ids"]))
        return [ids[text] for text in texts]


def _rendered_or_not(render: Callable[[Row], Rendered], row: Row) -> Rendered | Problem:
    try:
        return render(row)
    except RowRefused as error:
        return Problem(source=row.source, line=row.line, counted_in=row.counted_in, code=error.code, why=error.message)


def _batches(items: Iterator[Rendered | Problem]) -> Iterator[list[Rendered | Problem]]:
    batch, characters = [], 0
    for item in items:
        batch.append(item)
        characters += item.characters if isinstance(item, Rendered) else 0
        if len(batch) == ROWS_PER_BATCH or characters > CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    chat_template: str | None = None,
    name: str = "train",
    skip_bad_rows: int | None = NEVER,
) -> Encoded:
    """Token ids and labels of all rows; only completions or assistant turns, each with its stop token, are trained.

    ``chat_template`` is Jinja source that replaces the tokenizer's. Rows longer than ``max_length`` are truncated, and
    rows without a trained token are then dropped. Both are counted and warned of (RW215, RW216). Up to
    ``skip_bad_rows`` bad rows (None: all), including those that reading left out, are left out with a warning (RW223).

    Raises DataError: RW210 chat rows without a template, RW211 a template that refuses a row, RW212 a template that
    does not separate the assistant's text, RW213 no stop token, RW214 no trained token, RW115 no tokenizer, RW221 a
    template that omits a part of a row.
    """
    encoder = RowEncoder(rows, tokenizer, chat_template)
    return encode_by(encoder, rows, max_length=max_length, name=name, skip_bad_rows=skip_bad_rows)[0]


def encode_by(
    encoder: RowEncoder, rows: Rows, *, max_length: int, name: str, skip_bad_rows: int | None
) -> tuple[Encoded, list[Row]]:
    """(result of ``encode_rows`` with any encoder, the rows in the data set)."""
    table = _Table(max_length)
    problems, kept = [], []
    stop_ids: set[int] = set()
    for row, item in zip(rows.items, encoder.try_encode(rows.items)):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        stop_ids = stop_ids or encoder.stop_ids()
        if table.add(item, stop_ids):
            kept.append(row)
    tokens = len(table.ids)
    report = table.counts.report(name, encoder.template, rows, problems, skip_bad_rows, kept=len(kept), tokens=tokens)
    complain(report, rows, max_length)
    return Encoded(table.dataset(), report), kept


def complain(report: EncodingReport, rows: Rows, max_length: int) -> None:
    """Raise RW214, or warn RW215 and RW216, according to the report. Bad rows are handled elsewhere."""
    if report.rows == 0:
        raise DataError(
            "RW214",
            f"none of the {len(rows)} rows of {rows.source} has a token to train on within --max-length {max_length}"
            f" (the median row has {report.median_length:.0f} tokens); raise --max-length.",
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
            f"{report.dropped_rows} of {len(rows)} rows of {rows.source} were left out: within "
            f"--max-length {max_length} they have nothing to learn from.",
            stacklevel=3,
        )


class Counts:
    """The counts of an encoding in progress, from which its report is made."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.trained = self.truncated = self.dropped = self.stopped = 0

    def report(
        self,
        name: str,
        template: str,
        rows: Rows,
        problems: list[Problem],
        allowed: int | None,
        *,
        kept: int,
        tokens: int,
    ) -> EncodingReport:
        """``kept`` rows of ``tokens`` are in the data set. Raises or warns of ``problems``, as `check_bad_rows`."""
        check_bad_rows(problems, len(rows), allowed=allowed, before=len(rows.problems))
        problems = [*rows.problems, *problems]
        return EncodingReport(
            name=name,
            rows=kept,
            tokens=tokens,
            trained_tokens=self.trained,
            truncated_rows=self.truncated,
            dropped_rows=self.dropped,
            longest=max(self.lengths, default=0),
            median_length=statistics.median(self.lengths) if self.lengths else 0,
            template=template,
            stop_token_rows=self.stopped,
            skipped_rows=len(problems),
            skipped=[problem.to_json() for problem in problems],
        )


class _Table:
    """Collects the two columns in flat int32 arrays, which take a tenth of the memory of lists of lists."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.ids, self.labels, self.ends = array("i"), array("i"), array("i", [0])
        self.counts = Counts()

    def add(self, row: EncodedRow, stop_ids: set[int]) -> bool:
        """Add the row and return True, or count it as dropped if it has no trained token."""
        ids, trained = row.ids[: self.max_length], row.trained[: self.max_length]
        self.counts.lengths.append(row.length)
        if not any(trained):
            self.counts.dropped += 1
            return False
        labels = [token if is_trained else IGNORED for token, is_trained in zip(ids, trained)]
        self.ids.extend(ids)
        self.labels.extend(labels)
        self.ends.append(len(self.ids))
        self.counts.trained += sum(trained)
        self.counts.truncated += row.length > self.max_length
        self.counts.stopped += not stop_ids.isdisjoint(labels)
        return True

    def dataset(self) -> Dataset:
        import pyarrow
        from datasets import Dataset

        columns = {"input_ids": self.ids, "labels": self.labels}
        return Dataset(pyarrow.table({name: list_column(values, self.ends) for name, values in columns.items()}))


def list_column(values: array[int], ends: array[int]) -> ListArray:
    """A column of int32 lists, concatenated in ``values``; ``ends`` begins with 0."""
    import pyarrow

    flat = pyarrow.Array.from_buffers(pyarrow.int32(), len(values), [None, pyarrow.py_buffer(values)])
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends, type=pyarrow.int32()), flat)


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before every text, such as a BOS token, found by tokenizing a text.

    Ids at the end are added by the encoder.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


Pieces = tuple[list[int], list[bool]]


def tokenize_segments(
    tokenize: Callable[[list[str]], list[list[int]]], rows: Sequence[Sequence[Segment]]
) -> Iterator[Pieces]:
    """For each row: (ids, which of them are trained).

    ``tokenize`` maps texts to ids without special tokens. It needs no offsets, so slow tokenizers work too.
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
        return ids, _mask(row, lengths)
    # Tokenizers that mark the start of a text (SentencePiece) tokenize a later piece differently when it stands
    # alone; then the lengths of the growing prefixes tell where the pieces end.
    prefixes = tokenize(list(itertools.accumulate(segment.text for segment in row[:-1]))) if len(row) > 1 else []
    if all(ids[: len(prefix)] == prefix for prefix in prefixes):
        ends = [0, *(len(prefix) for prefix in prefixes), len(ids)]
        return ids, _mask(row, [end - start for start, end in itertools.pairwise(ends)])
    return apart, _mask(row, lengths)


def _mask(row: Sequence[Segment], lengths: Sequence[int]) -> list[bool]:
    mask: list[bool] = []
    for segment, length in zip(row, lengths):
        mask += [segment.trained] * length
    return mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """A row after truncation. The texts of ``segments``, joined, are the decoded ``ids``."""

    source: str
    line: int
    # Source and line, or number, in words.
    place: str
    # The columns that were recognised.
    format: str
    # How the row was written.
    template: str
    segments: tuple[Segment, ...]
    ids: tuple[int, ...]
    tokens: int
    trained_tokens: int
    # Before truncation.
    full_tokens: int
    # Whether a stop token is trained on.
    stop_token: bool
    # For preferences: whether the answer is good.
    label: bool | None = None
    # For pairs: the worse answer.
    rejected: Preview | None = None

    @property
    def truncated(self) -> bool:
        return self.full_tokens > self.tokens

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / max(self.tokens, 1)


def first_good_row(rows: Rows, report: EncodingReport) -> int:
    """The index of the first row in the source, from 0, that ``report`` does not list as bad."""
    bad = {problem["row"] for problem in report.skipped}
    unread = {problem.index for problem in rows.problems}
    indices = (index for index in itertools.count() if index not in unread)
    return next(index for index, row in zip(indices, rows) if row.place not in bad)


def preview_row(
    rows: Rows,
    index: int,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    chat_template: str | None = None,
    prompt_alone: bool = False,
) -> Preview:
    """Row ``index`` of the source (from 0) as ``encode_rows`` would encode it, even if nothing of it is trained on.

    With ``prompt_alone`` as ``encode_prompts`` would encode it.

    Raises DataError: RW217 if there is no such row, a bad row's own error, and otherwise as ``encode_rows``.
    """
    total = len(rows) + len(rows.problems)
    if not 0 <= index < total:
        raise DataError("RW217", f"{rows.source} has no row {index}; its {total} rows count from 0.")
    check_bad_rows([problem for problem in rows.problems if problem.index == index], 1)
    encoder = RowEncoder(rows, tokenizer, chat_template)
    row = rows[index - sum((problem.index or 0) < index for problem in rows.problems)]
    shown = _preview(rows, row, encoder, max_length, prompt_alone=prompt_alone)
    if row.rejected is None:
        return shown
    return dataclasses.replace(shown, rejected=_preview(rows, row.rejected, encoder, max_length))


def _preview(rows: Rows, row: Row, encoder: RowEncoder, max_length: int, *, prompt_alone: bool = False) -> Preview:
    [encoded] = encoder.encode([row])
    if prompt_alone:
        encoded = EncodedRow(encoded.ids[: encoded.start], encoded.trained[: encoded.start])
    ids, trained = encoded.ids[:max_length], encoded.trained[:max_length]
    if row.label is not None:
        trained = [place >= encoded.start for place in range(len(ids))]
    labels = {token for token, is_trained in zip(ids, trained) if is_trained}
    return Preview(
        source=row.source,
        line=row.line,
        place=row.place,
        format=rows.format,
        template=encoder.template,
        segments=_decoded(encoder.tokenizer, ids, trained),
        ids=tuple(ids),
        tokens=len(ids),
        trained_tokens=sum(trained),
        full_tokens=encoded.length,
        stop_token=not encoder.stop_ids().isdisjoint(labels),
        label=row.label,
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]) -> tuple[Segment, ...]:
    segments, end, shown = [], 0, ""
    for is_trained, group in itertools.groupby(trained):
        end += len(list(group))
        # Decoding the whole beginning keeps white space that decoding a piece alone would lose.
        text = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        segments.append(Segment(text[len(shown) :], is_trained))
        shown = text
    return tuple(segments)
