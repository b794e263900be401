"""The interface between a run and its memory plan. The command line connects the two."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from datasets import Dataset

from rankwise.acceleration.packing import members_of
from rankwise.acceleration.scoring import loss_scorer
from rankwise.constants import IGNORED
from rankwise.data.preferences import ANSWER_IDS
from rankwise.foreign import Fields
from rankwise.training.loss import evaluation_targets
from rankwise.training.state import undisturbed_random_states

if TYPE_CHECKING:
    from rankwise.training.objectives.preferences import PreferenceTrainer
    from rankwise.training.spine import RunTrainer

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

    def before_loading(self) -> None:
        """Called before the model is loaded."""

    def before_training(self, batch: MicroBatch, evaluation: MicroBatch | None, mapped_bytes: int) -> int | None:
        """Called when everything is loaded and encoded, with the largest micro-batches of training and of evaluation,
        and the bytes of the weights that lie in mapped files.

        Returns the expected peak in bytes, as the run's ``MemoryMeter`` measures it.
        """


def largest_batch(trainer: RunTrainer, *, flat: bool) -> MicroBatch:
    """The largest micro-batch of the run; ``flat``: rows are concatenated, not padded."""
    shared = flat and getattr(trainer, "shares_prompts", False)
    lengths = _lengths(trainer.train_dataset, shared=shared)
    return _largest(trainer.train_dataset, lengths, coming_batches(trainer), flat=flat)


def largest_evaluation(trainer: RunTrainer) -> MicroBatch | None:
    """The largest batch of an evaluation; None without evaluations."""
    if trainer.eval_dataset is None:
        return None
    targets = evaluation_targets(trainer.eval_dataset)
    scorer = loss_scorer(trainer.model)
    scorer.packs = True
    batches = [(len(rows), max(row.length for row in rows), rows) for rows in scorer.batches(targets)]
    count, tokens, rows = max(batches, key=lambda batch: batch[0] * batch[1], default=(1, 1, []))
    asked = sum(len(targets[member].places) for member in members_of(rows))
    return MicroBatch(count, tokens, min(1.0, max(asked, 1) / (count * tokens)))


def largest_scoring(trainer: PreferenceTrainer) -> MicroBatch | None:
    """The largest batch of preferences that is scored without gradients; None where there is none.

    These are the batches of evaluations, with rows in the order of the data, and the mismatched answers that KTO scores
    in every step.
    """
    flat, found = trainer.args.flat, []
    sets = (trainer.train_dataset, trainer.args.per_device_train_batch_size, MISMATCHED)
    more = (trainer.eval_dataset, trainer.args.per_device_eval_batch_size)
    for dataset, size, answers in (sets, (*more, MISMATCHED), (*more, ANSWER_IDS)):
        if dataset is not None and not {*answers}.isdisjoint(dataset.column_names):
            lengths = _lengths(dataset, shared=flat and trainer.shares_prompts, answers=answers)
            found.append(_largest(dataset, lengths, [_table(np.arange(len(dataset)), size)], flat=flat))
    return max(found, key=lambda batch: batch.rows * batch.tokens, default=None)


def coming_batches(trainer: RunTrainer) -> Iterator[np.ndarray]:
    """Yields, for each epoch, the row numbers of the micro-batches of its steps: (batches, rows).

    The order is that of the Trainer's sampler, which the seed fixes; -1 fills up a shorter last batch.
    """
    arguments = trainer.args
    with undisturbed_random_states():
        loader = trainer.get_train_dataloader()
        steps_an_epoch = math.ceil(len(loader) / arguments.gradient_accumulation_steps)
        left = trainer.total_steps
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            order = np.array(list(itertools.chain.from_iterable(loader.batch_sampler)))
            yield _table(order, arguments.per_device_train_batch_size)[: left * arguments.gradient_accumulation_steps]
            left -= steps_an_epoch
            if left <= 0:
                return


def _table(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Row numbers by batch: (batches, batch_size)."""
    return np.pad(rows, (0, -len(rows) % batch_size), constant_values=-1).reshape(-1, batch_size)


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
