"""The interface between a run and its memory plan. The command line connects the two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from datasets import Dataset

from rankwise.acceleration.packing import members_of
from rankwise.acceleration.scoring import Target, loss_scorer, trained_target
from rankwise.constants import IGNORED
from rankwise.data.preferences import ANSWER_IDS
from rankwise.foreign import Fields
from rankwise.training import ranks

if TYPE_CHECKING:
    from rankwise.models.mapped import MappedFiles
    from rankwise.training.loop import Loop

ROWS_AT_ONCE = 10_000
# The columns of KTO's mismatched answers (answers to another prompt of the batch).
MISMATCHED = ("KL_completion_ids",)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The properties of a micro-batch on which memory depends."""

    # Number of rows; a pair of answers is one row.
    rows: int
    # Tokens of a row, or of one side of a pair: of the longest where rows are padded, the mean where they are
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


def largest_batch(loop: Loop, *, flat: bool) -> MicroBatch:
    """The largest micro-batch of the run; ``flat``: rows are concatenated, not padded."""
    objective: Any = loop.objective
    shared = flat and hasattr(objective, "scoring") and objective.scoring.shares_prompts
    lengths = _lengths(objective.rows, shared=shared)
    return _largest(objective.rows, lengths, coming_batches(loop), flat=flat)


def largest_evaluation(loop: Loop) -> MicroBatch | None:
    """The largest batch of an evaluation; None without evaluations."""
    if loop.objective.eval_rows is None:
        return None
    targets = evaluation_targets(loop.objective.eval_rows)
    scorer = loss_scorer(loop.model)
    scorer.packs = True
    batches = [(len(rows), max(row.length for row in rows), rows) for rows in scorer.batches(targets)]
    count, tokens, rows = max(batches, key=lambda batch: batch[0] * batch[1], default=(1, 1, []))
    asked = sum(len(targets[member].places) for member in members_of(rows))
    return MicroBatch(count, tokens, min(1.0, max(asked, 1) / (count * tokens)))


def largest_scoring(loop: Loop) -> MicroBatch | None:
    """The largest batch of preferences that is scored without gradients; None where there is none.

    These are the batches of evaluations, with rows in the order of the data, and the mismatched answers that KTO scores
    in every step.
    """
    objective: Any = loop.objective
    scoring, found = objective.scoring, []
    sets = ((objective.rows, MISMATCHED), (objective.eval_rows, MISMATCHED), (objective.eval_rows, ANSWER_IDS))
    for dataset, answers in sets:
        if dataset is not None and not {*answers}.isdisjoint(dataset.column_names):
            lengths = _lengths(dataset, shared=scoring.shares_prompts, answers=answers)
            found.append(_largest(dataset, lengths, [_in_order(dataset, objective.size)], flat=scoring.asked.flat))
    return max(found, key=lambda batch: batch.rows * batch.tokens, default=None)


def largest_answering(loop: Loop) -> MicroBatch | None:
    """The largest batch of texts that an evaluation answers with labels; None without evaluations."""
    objective: Any = loop.objective
    rows = objective.eval_rows
    return None if rows is None else _largest(rows, _lengths(rows), [_in_order(rows, objective.size)], flat=False)


def _in_order(dataset: Dataset, size: int) -> np.ndarray:
    """The row numbers of this process's parts of batches of ``size`` rows in the order of the data."""
    return _table([[*range(len(dataset))][start : start + size] for start in range(0, len(dataset), size)])


def evaluation_targets(dataset: Dataset) -> list[Target]:
    """The scored tokens of an evaluation's encoded rows. A row whose only trained token is its first has none."""
    trained = ([label != IGNORED for label in row] for row in dataset["labels"])
    return [target for target in map(trained_target, dataset["input_ids"], trained) if target is not None]


def coming_batches(loop: Loop) -> Iterator[np.ndarray]:
    """Yields, for each epoch, the row numbers of this process's micro-batches: (batches, rows), -1 in shorter ones."""
    left = loop.options.total_steps * loop.options.accumulation
    for epoch in range(math.ceil(loop.options.total_steps / loop.steps_an_epoch)):
        order = loop.objective.order(epoch)[:left]
        yield _table(order)
        left -= loop.steps_an_epoch * loop.options.accumulation


def _table(batches: Sequence[list[int]]) -> np.ndarray:
    """The row numbers of this process's parts of ``batches``: (batches, rows)."""
    parts = [ranks.share(batch) or batch[:1] for batch in batches]
    widest = max(map(len, parts))
    return np.array([[*part, *[-1] * (widest - len(part))] for part in parts])


def _largest(dataset: Dataset, sides: np.ndarray, tables: Iterable[np.ndarray], *, flat: bool) -> MicroBatch:
    """The batch with the most tokens, padding included, and among these the one with the longest row."""
    # Row -1 has no tokens.
    lengths = np.vstack([sides, np.zeros_like(sides[:1])])
    most: tuple[int, int] = (0, 0)
    found = np.empty(0, int)
    for table in tables:
        longest, together = lengths[table].max((1, 2)), lengths[table].sum((1, 2))
        tokens = together if flat else longest * (table >= 0).sum(1) * sides.shape[1]
        best = np.lexsort((longest, tokens))[-1]
        if (tokens[best], longest[best]) > most:
            most, found = (tokens[best], longest[best]), table[best][table[best] >= 0]
    trained = sum(map(_trained, dataset.select(found.tolist())))
    sequences = len(found) * sides.shape[1]
    tokens_a_row = math.ceil(most[0] / sequences)
    return MicroBatch(len(found), tokens_a_row, min(1.0, max(trained, 1) / (sequences * tokens_a_row)))


def _trained(row: Fields) -> int:
    """The number of trained tokens of a row."""
    answers = sum(len(row.get(name, ())) for name in ANSWER_IDS)
    return answers + sum(label != IGNORED for label in row.get("labels", ()))


def longest_row(dataset: Dataset) -> int:
    """The number of tokens of the longest row in an encoded data set."""
    return int(_lengths(dataset).max())


def _lengths(dataset: Dataset, *, shared: bool = False, answers: Sequence[str] = ANSWER_IDS) -> np.ndarray:
    """The number of tokens of every row, for each side of a pair: (rows, sides).

    ``shared``: the prompt, which both sides share, counts for the first side only. ``answers``: the columns that hold
    answers, where a data set has them.
    """
    import pyarrow.compute as pc

    def of(name: str) -> np.ndarray:
        columns = dataset.select_columns([name]).with_format("arrow")
        return np.concatenate([pc.list_value_length(table[name]).to_numpy() for table in columns.iter(ROWS_AT_ONCE)])

    if "input_ids" in dataset.column_names:
        return of("input_ids")[:, None]
    prompts, found = of("prompt_ids"), [of(name) for name in answers if name in dataset.column_names]
    return np.stack([answer + (0 if side and shared else prompts) for side, answer in enumerate(found)], axis=1)
