"""Encode rows to token ids and labels.

Legend: ``ids`` are a row's token ids, ``trained`` one boolean per id, ``labels`` the id where trained, else -100. A row
is tokenized as one text. Where one token would cross the border of prompt and answer, the pieces are tokenized
separately, so that the prompt's ids in training equal those in generation.

Encoded rows can be kept on disk; the key is a hash of everything that the encoding depends on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.constants import IGNORED
from rankwise.data.rows import NEVER, Problem, Row, Rows, check_bad_rows
from rankwise.data.templates import ChatRenderer, Rendered, RowRefused, Segment, renderer
from rankwise.disk import hold
from rankwise.errors import ConfigError, DataError, RunError, warn
from rankwise.records import write_bytes

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ListArray
    from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows are tokenized in batches, each ended by the first of these bounds.
ROWS_PER_BATCH = 2000
CHARACTERS_PER_BATCH = 1 << 24
# A longer text is tokenized only up to max_length tokens plus SPARE_TOKENS, since the following text affects the last
# tokens before a cut.
WHOLE_CHARACTERS, SPARE_TOKENS = 100_000, 256


@dataclasses.dataclass(frozen=True)
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
    # Number of kept rows whose pieces were tokenized separately, since a token would have crossed prompt and answer.
    split_rows: int = 0
    # Number of rows far longer than max_length, whose length is partly estimated.
    estimated_rows: int = 0
    # {part of rows that the chat template omits: number of rows}.
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
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
    """One row before truncation; of a very long row only the beginning."""

    ids: list[int]
    trained: list[bool]
    split: bool
    # Number of tokens of the whole row.
    length: int
    estimated: bool = False


class RowEncoder:
    """Tokenizes rows. ``template`` names how they are formatted."""

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase | None, chat_template: str | None) -> None:
        if tokenizer is None:
            raise ConfigError("RW115", "the model has no tokenizer to encode text with; add its tokenizer files.")
        self.tokenizer = tokenizer
        self.template, self._render = renderer(rows, tokenizer, chat_template)
        self.left_out: Counter[str] = Counter()
        self._opening = _opening_ids(tokenizer)

    def stop_ids(self) -> set[int]:
        stop = self._render.stop if isinstance(self._render, ChatRenderer) else None
        return {self.tokenizer.eos_token_id if stop is None else self._ids([stop])[0][-1]}

    def encode(self, rows: Sequence[Row], max_length: int | None = None) -> list[EncodedRow]:
        """Token ids of some rows, at least up to ``max_length``. Raises DataError, which names the refused rows."""
        return all_encoded(self, rows, max_length)

    def try_encode(self, rows: Sequence[Row], max_length: int | None = None) -> Iterator[EncodedRow | Problem]:
        """Encode each row, or return the Problem with it. ``left_out`` counts parts that the template omits."""
        self.left_out = Counter()
        for batch in _batches(_rendered_or_not(self._render, row) for row in rows):
            texts = [item for item in batch if isinstance(item, Rendered)]
            encoded = iter(self._encode_batch(texts, max_length))
            for item in batch:
                if isinstance(item, Rendered):
                    self.left_out.update(item.left_out)
                yield next(encoded) if isinstance(item, Rendered) else item

    def _encode_batch(self, batch: Sequence[Rendered], max_length: int | None) -> list[EncodedRow]:
        long = {place for place, item in enumerate(batch) if max_length and item.characters > WHOLE_CHARACTERS}
        whole = [item.segments for place, item in enumerate(batch) if place not in long]
        pieces = tokenize_segments(self._ids, whole)
        return [
            self._beginning(item, max_length) if max_length and place in long else self._framed(*next(pieces), item)
            for place, item in enumerate(batch)
        ]

    def _beginning(self, item: Rendered, max_length: int) -> EncodedRow:
        """The beginning of a long row that gives ``max_length`` ids, or the whole row where it has few tokens."""
        characters = WHOLE_CHARACTERS
        while characters < item.characters:
            [piece] = tokenize_segments(self._ids, [_cut(item.segments, characters)])
            row = self._framed(*piece, dataclasses.replace(item, closed=False))
            if row.length > max_length + SPARE_TOKENS:
                length = round(row.length * item.characters / characters)
                return EncodedRow(row.ids[:max_length], row.trained[:max_length], row.split, length, estimated=True)
            characters *= 4
        [piece] = tokenize_segments(self._ids, [item.segments])
        return self._framed(*piece, item)

    def _framed(self, ids: list[int], trained: list[bool], split: bool, rendered: Rendered) -> EncodedRow:
        if rendered.opened:
            ids, trained = self._opening + ids, [False] * len(self._opening) + trained
        if rendered.closed:
            ids, trained = [*ids, self.tokenizer.eos_token_id], [*trained, True]
        return EncodedRow(ids, trained, split, len(ids))

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
        return Problem(row.source, row.line, row.counted_in, error.code, error.message)


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


def _cut(segments: Sequence[Segment], characters: int) -> list[Segment]:
    """The first ``characters`` characters of the text."""
    kept = []
    for segment in segments:
        if characters <= 0:
            break
        kept.append(Segment(segment.text[:characters], segment.trained))
        characters -= len(segment.text)
    return kept


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
    template that omits a part of a row, RW222 an answer that is only its stop token.
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
    for row, item in zip(rows.items, encoder.try_encode(rows.items, max_length)):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        stop_ids = stop_ids or encoder.stop_ids()
        if table.add(item, stop_ids):
            kept.append(row)
    check_bad_rows(problems, len(rows), allowed=skip_bad_rows, before=len(rows.problems))
    bad = [*rows.problems, *problems]
    report = table.counts.report(name, encoder, bad, rows=len(table.ends) - 1, tokens=len(table.ids))
    complain(report, rows, max_length)
    return Encoded(table.dataset(), report), kept


def all_encoded(encoder: RowEncoder, rows: Sequence[Row], max_length: int | None = None) -> list[EncodedRow]:
    """Token ids of some rows, at least up to ``max_length``. Raises DataError, which names the refused rows."""
    found = list(encoder.try_encode(rows, max_length))
    problems = [item for item in found if isinstance(item, Problem)]
    check_bad_rows(problems, len(rows))
    warn_of_left_out(encoder.left_out, len(rows), rows[0].source if rows else "")
    return [item for item in found if isinstance(item, EncodedRow)]


def warn_of_left_out(left_out: Mapping[str, int], total: int, source: str) -> None:
    """Warn (RW226) of optional parts of rows that the template omits: unknown fields, reasoning of earlier turns."""
    if left_out:
        named = ", ".join(f"{name} (in {count:,})" for name, count in left_out.items())
        warn(
            "RW226",
            f"of the {total:,} rows of {source} the model does not see {named}; if it should, give a chat template "
            "that writes these with --chat-template FILE.",
            stacklevel=4,
        )


def complain(report: EncodingReport, rows: Rows, max_length: int) -> None:
    """Raise RW214, or warn RW215 and RW216, according to the report. Bad rows are handled elsewhere."""
    warn_of_left_out(report.left_out, len(rows), rows.source)
    if report.rows == 0:
        raise DataError(
            "RW214",
            f"none of the {len(rows)} rows of {rows.source} has a token to train on within --max-length {max_length}"
            f" (the median row has {report.median_length:.0f} tokens); raise --max-length.",
        )
    about = "about " if report.estimated_rows else ""
    if report.truncated_rows:
        warn(
            "RW215",
            f"{report.truncated_rows} of {len(rows)} rows of {rows.source} were cut at --max-length {max_length} and "
            f"lost their end, the stop token included (the longest has {about}{report.longest} tokens).",
            stacklevel=3,
        )
    if report.dropped_rows:
        warn(
            "RW216",
            f"{report.dropped_rows} of {len(rows)} rows of {rows.source} were left out: their prompt alone fills "
            f"--max-length {max_length}.",
            stacklevel=3,
        )


class Counts:
    """The counts of an encoding in progress, from which its report is made."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.trained = self.truncated = self.dropped = self.stopped = self.split = self.estimated = 0

    def report(
        self, name: str, encoder: RowEncoder, problems: Sequence[Problem], *, rows: int, tokens: int
    ) -> EncodingReport:
        """``rows`` and ``tokens`` are those that the data set holds."""
        return EncodingReport(
            name=name,
            rows=rows,
            tokens=tokens,
            trained_tokens=self.trained,
            truncated_rows=self.truncated,
            dropped_rows=self.dropped,
            longest=max(self.lengths, default=0),
            median_length=statistics.median(self.lengths) if self.lengths else 0,
            template=encoder.template,
            stop_token_rows=self.stopped,
            split_rows=self.split,
            estimated_rows=self.estimated,
            left_out=dict(encoder.left_out),
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
        """Add the row and return True, or count it as dropped where it has no trained token."""
        ids, trained = row.ids[: self.max_length], row.trained[: self.max_length]
        self.counts.lengths.append(row.length)
        self.counts.estimated += row.estimated
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
        self.counts.split += row.split
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


Pieces = tuple[list[int], list[bool], bool]


def tokenize_segments(
    tokenize: Callable[[list[str]], list[list[int]]], rows: Sequence[Sequence[Segment]]
) -> Iterator[Pieces]:
    """For each row: (ids, which of them are trained, whether its segments were tokenized separately).

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


# Version of the encoding, raised whenever the same rows give other ids or labels.
VERSION = 4
COLUMNS = ("ids", "labels", "ends")


def encode_rows_once(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: str | None,
    name: str,
    skip_bad_rows: int | None = NEVER,
    cache: Path,
) -> Encoded:
    """Encode the rows, or read what an earlier call on the same rows left in ``cache``.

    Warnings and errors are those of ``encode_rows``.
    """
    key = _key(rows, tokenizer, max_length, chat_template)
    path = None if key is None else cache / f"rows-{key[:32]}.safetensors"
    known = None if path is None else _read(path, rows, max_length, name)
    if known is not None:
        complain(known.report, rows, max_length)
        return known
    encoded = encode_rows(
        rows,
        tokenizer,
        max_length=max_length,
        chat_template=chat_template,
        name=name,
        skip_bad_rows=skip_bad_rows,
    )
    # Rows that the encoder left out need its warnings again, so they are encoded again.
    if path is not None and encoded.report.skipped_rows == len(rows.problems):
        try:
            with hold(path):
                write_bytes(path, _stored(encoded))
        except RunError as error:
            # Another process writes the same rows.
            if error.code != "RW582":
                raise
    return encoded


def _key(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: str | None) -> str | None:
    """The cache key; None for a tokenizer whose content cannot be hashed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = (tokenizer.special_tokens_map, tokenizer.chat_template, type(tokenizer).__name__)
    parts = (VERSION, max_length, chat_template, rows.kind, rows.uses_template, rows.separator, special)
    digest = hashlib.sha256(repr(parts).encode())
    digest.update(backend.to_str().encode())
    for row in rows:
        fields = (row.messages, row.prompt, row.completion, row.text, row.tools, row.first_trained)
        digest.update(repr(fields).encode("utf-8", errors="backslashreplace"))
    return digest.hexdigest()


def _stored(encoded: Encoded) -> bytes:
    import numpy as np
    import safetensors.numpy

    table = encoded.dataset.data.table.combine_chunks()
    ids, labels = (table.column(name).chunk(0) for name in ("input_ids", "labels"))
    columns = {"ids": ids.values, "labels": labels.values, "ends": ids.offsets}
    arrays = {name: np.asarray(values, dtype=np.int32) for name, values in columns.items()}
    report = json.dumps(dataclasses.asdict(encoded.report))
    digest = _digest(report, *(arrays[name].tobytes() for name in COLUMNS))
    return safetensors.numpy.save(arrays, metadata={"report": report, "sha256": digest})


def _digest(report: str, *columns: bytes) -> str:
    return hashlib.sha256(b"".join([report.encode(), *columns])).hexdigest()


def _read(path: Path, rows: Rows, max_length: int, name: str) -> Encoded | None:
    """The cached rows; None where there is no such file, or where its content does not match its hash."""
    import safetensors

    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            columns = {column: file.get_tensor(column).tobytes() for column in COLUMNS}
    except (OSError, safetensors.SafetensorError, TypeError, UnicodeDecodeError):
        return None
    # Wrong ids would train another model, and wrong ends read outside the arrays.
    if metadata.get("sha256") != _digest(metadata.get("report", ""), *columns.values()):
        return None
    table = _Table(max_length)
    for column, content in columns.items():
        setattr(table, column, array("i", content))
    skipped = [problem.to_json() for problem in rows.problems]
    own = {"name": name, "skipped": skipped, "skipped_rows": len(skipped)}
    return Encoded(table.dataset(), EncodingReport(**{**json.loads(metadata["report"]), **own}))
