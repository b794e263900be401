"""The interface between a run and its memory plan. The command line connects the two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from datasets import Dataset

from rankwise.constants import IGNORED
from rankwise.data.objectives import ANSWER_IDS
from rankwise.foreign import Fields
from rankwise.training import ranks

if TYPE_CHECKING:
    from rankwise.models.prepared import MappedFiles
    from rankwise.training.loop import Loop

ROWS_AT_ONCE = 10_000


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The properties of a micro-batch on which memory depends."""

    # Number of rows; a pair of answers is one row.
    rows: int
    # Tokens of a row, or of one side of a pair: of the longest if rows are padded, the mean if they are
    # concatenated.
    tokens: int
    # Share of all tokens that are in the loss.
    trained_share: float


class Foresight(Protocol):
    """A memory plan that is asked before a run starts. Both methods may raise to refuse the run."""

    def before_loading(self, labels: int) -> None:
        """Called before the model is loaded, with the number of labels of its head; 0 for a language model."""

    def before_training(self, batch: MicroBatch, evaluation: MicroBatch | None, mapped: MappedFiles) -> int | None:
        """Called when everything is loaded and encoded, with the largest micro-batches of training and of evaluation,
        and the files from which weights are mapped.

        Returns the expected peak in bytes, as the run's ``MemoryMeter`` measures it.
        """


def coming_batches(loop: Loop) -> Iterator[list[int]]:
    """The row numbers of this process's micro-batches, from the first step to the last."""
    left = loop.options.total_steps * loop.options.accumulation
    for epoch in range(math.ceil(loop.options.total_steps / loop.steps_an_epoch)):
        yield from own_parts(loop.objective.order(epoch)[:left])
        left -= loop.steps_an_epoch * loop.options.accumulation


def own_parts(batches: Iterable[list[int]]) -> Iterator[list[int]]:
    """This process's part of each batch: one row at least."""
    return (ranks.share(batch) or batch[:1] for batch in batches)


def largest(
    dataset: Dataset,
    batches: Iterable[list[int]],
    *,
    flat: bool,
    shared: bool = False,
    answers: Sequence[str] = ANSWER_IDS,
) -> MicroBatch:
    """The batch with the most tokens, padding included, and among these the one with the longest row.

    ``flat``: rows are laid end to end, not padded. ``shared``: the prompt, which both sides of a pair share, counts for
    the first side only. ``answers``: the columns that hold answers, where a data set has them.
    """
    lengths: list[list[int]] = _lengths(dataset, shared=shared, answers=answers).tolist()

    def size(batch: list[int]) -> tuple[int, int]:
        longest = max(max(lengths[row]) for row in batch)
        together = sum(sum(lengths[row]) for row in batch)
        return together if flat else longest * len(batch) * len(lengths[0]), longest

    found = max(batches, key=size)
    sequences = len(found) * len(lengths[0])
    tokens = math.ceil(size(found)[0] / sequences)
    trained = sum(map(_trained, dataset.select(found)))
    return MicroBatch(len(found), tokens, min(1.0, max(trained, 1) / (sequences * tokens)))


def _trained(row: Fields) -> int:
    """The number of trained tokens of a row."""
    answers = sum(len(row.get(name, ())) for name in ANSWER_IDS)
    return answers + sum(label != IGNORED for label in row.get("labels", ()))


def longest_row(dataset: Dataset) -> int:
    """The number of tokens of the longest row in an encoded data set."""
    return int(_lengths(dataset).max())


def _lengths(dataset: Dataset, *, shared: bool = False, answers: Sequence[str] = ANSWER_IDS) -> np.ndarray:
    """The number of tokens of every row, for each side of a pair: (rows, sides)."""
    import pyarrow.compute as pc

    def of(name: str) -> np.ndarray:
        columns = dataset.select_columns([name]).with_format("arrow")
        return np.concatenate([pc.list_value_length(table[name]).to_numpy() for table in columns.iter(ROWS_AT_ONCE)])

    if "input_ids" in dataset.column_names:
        return of("input_ids")[:, None]
    prompts, found = of("prompt_ids"), [of(name) for name in answers if name in dataset.column_names]
    return np.stack([answer + (0 if side and shared else prompts) for side, answer in enumerate(found)], axis=1)
