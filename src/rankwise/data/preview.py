"""One row as the model sees it, for ``rankwise preview``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rankwise.data.encoding import EncodedRow, EncodingReport, RowEncoder
from rankwise.data.preferences import completion_start
from rankwise.data.rows import Row, Rows, check_bad_rows
from rankwise.data.templates import Segment
from rankwise.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
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
        length = encoded.trained.index(True)
        encoded = EncodedRow(encoded.ids[:length], encoded.trained[:length])
    ids, trained = encoded.ids[:max_length], encoded.trained[:max_length]
    if row.label is not None:
        start = completion_start(encoded)
        trained = [place >= start for place in range(len(ids))]
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
