"""The interface between a run and its memory plan. The command line connects the two."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rankwise.acceleration.packing import members_of
from rankwise.acceleration.scoring import loss_scorer
from rankwise.constants import IGNORED
from rankwise.data.preferences import ANSWER_IDS
from rankwise.foreign import Fields
from rankwise.training.loss import evaluation_targets
from rankwise.training.state import undisturbed_random_states

ROWS_AT_ONCE = 10_000
# KTO's answers to other prompts of their batch.
MISMATCHED = ("KL_completion_ids",)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The properties of a micro-batch on which memory depends."""

    # A pair is one.
    rows: int
    # Of each row or side of a pair: of the longest where they are padded to it, of the mean where they are laid end to
    # end.
    tokens: int
    # Of all tokens, in the loss.
    trained_share: float
    # Of a row's tokens, those that stand for images.
    image_tokens: int = 0


class Foresight(Protocol):
    """A memory plan that looks at a run before it starts. Either call may raise and so refuse the run."""

    def before_loading(self) -> None:
        """The prediction before the model is in memory."""

    def before_training(self, batch: MicroBatch, evaluation: MicroBatch | None) -> int | None:
        """Called when everything is loaded and encoded, with the largest micro-batches of training and of evaluations.

        Returns the expected peak, in the terms of the run's own meter.
        """


def largest_batch(trainer: Any, *, flat: bool) -> MicroBatch:
    """The largest micro-batch of the run; ``flat``: rows are laid end to end, not padded."""
    shared = flat and getattr(trainer, "shares_prompts", False)
    lengths = _lengths(trainer.train_dataset, shared=shared)
    return _largest(trainer.train_dataset, lengths, coming_batches(trainer), flat=flat)


def largest_evaluation(trainer: Any) -> MicroBatch | None:
    """The largest batch of an evaluation, whose batches depend on its rows alone; None without evaluations."""
    if trainer.eval_dataset is None:
        return None
    targets = evaluation_targets(trainer.eval_dataset)
    scorer = loss_scorer(trainer.model)
    scorer.packs = True
    batches = [(len(rows), max(row.length for row in rows), rows) for rows in scorer.batches(targets)]
    count, tokens, rows = max(batches, key=lambda batch: batch[0] * batch[1], default=(1, 1, []))
    asked = sum(len(targets[member].places) for member in members_of(rows))
    return MicroBatch(count, tokens, min(1.0, max(asked, 1) / (count * tokens)))


def largest_scoring(trainer: Any) -> MicroBatch | None:
    """The largest batch of preferences that is scored without a gradient; None where there is none.

    Such batches are those of evaluations, and those of mismatched answers that KTO scores in every step. Rows come in
    the order of the data.
    """
    import numpy as np

    flat, found = trainer.args.flat, []
    sets = (trainer.train_dataset, trainer.args.per_device_train_batch_size, MISMATCHED)
    more = (trainer.eval_dataset, trainer.args.per_device_eval_batch_size)
    for dataset, size, answers in (sets, (*more, MISMATCHED), (*more, ANSWER_IDS)):
        if dataset is not None and not {*answers}.isdisjoint(dataset.column_names):
            lengths = _lengths(dataset, shared=flat and trainer.shares_prompts, answers=answers)
            found.append(_largest(dataset, lengths, [_table(np.arange(len(dataset)), size)], flat=flat))
    return max(found, key=lambda batch: batch.rows * batch.tokens, default=None)


def coming_batches(trainer: Any) -> Iterator[Any]:
    """For each epoch the row numbers of the micro-batches that its steps take: (batches, rows).

    They come from the Trainer's own sampler, which the seed fixes; -1 where the last batch has fewer rows.
    """
    import numpy as np

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


def _table(rows: Any, batch_size: int) -> Any:
    """Row numbers by batch: (batches, batch_size)."""
    import numpy as np

    return np.pad(rows, (0, -len(rows) % batch_size), constant_values=-1).reshape(-1, batch_size)


def _largest(dataset: Any, sides: Any, tables: Any, *, flat: bool) -> MicroBatch:
    """The batch with most tokens, padding included; then the one with the longest row. A pair is two rows."""
    import numpy as np

    # Row -1 has no tokens.
    lengths = np.vstack([sides, np.zeros_like(sides[:1])])
    most: tuple[int, int] = (0, 0)
    found: Any = None
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


def longest_row(dataset: Any) -> int:
    """Tokens of the longest row of an encoded data set."""
    return int(_lengths(dataset).max())


def _lengths(dataset: Any, *, shared: bool = False, answers: Sequence[str] = ANSWER_IDS) -> Any:
    """Tokens of every row, and of each side of a pair: (rows, sides). ``shared``: the first has the prompt of both.

    ``answers``: the columns that hold answers, where a data set has them.
    """
    import numpy as np
    import pyarrow.compute as pc

    def of(name: str) -> Any:
        columns = dataset.select_columns([name]).with_format("arrow")
        return np.concatenate([pc.list_value_length(table[name]).to_numpy() for table in columns.iter(ROWS_AT_ONCE)])

    if "input_ids" in dataset.column_names:
        return of("input_ids")[:, None]
    prompts, found = of("prompt_ids"), [of(name) for name in answers if name in dataset.column_names]
    return np.stack([answer + (0 if side and shared else prompts) for side, answer in enumerate(found)], axis=1)
