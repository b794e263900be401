"""What a run is planned for: the batches that its steps really take, and its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_rows import encoded_rows, fit

from rankwise.training.batches import MicroBatch, largest
from rankwise.training.loop import coming_batches
from rankwise.training.objectives import Preferences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LoopMaker = Callable[..., Any]


def with_rows(loop_of: LoopMaker, lengths: list[int], eval_lengths: list[int] | None = None, **given: Any) -> Any:
    """A loop over rows of these lengths, of which two tokens are prompt."""

    def rows(counts: list[int]) -> Dataset:
        ids = [[4 + row % 80] * count for row, count in enumerate(counts)]
        return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})

    return loop_of(rows=rows(lengths), eval_rows=0 if eval_lengths is None else rows(eval_lengths), **given)


@pytest.mark.parametrize(
    ("rows", "length"),
    [(37, {"max_steps": 3}), (37, {"max_steps": 25}), (37, {"max_steps": None, "epochs": 1.5}), (3, {"max_steps": 4})],
)
@pytest.mark.parametrize("flat", [False, True])
def test_the_batches_foreseen_are_those_that_come(
    loop_of: LoopMaker, rows: int, length: dict[str, Any], flat: bool
) -> None:
    """Over several epochs, the short batch at the end of each and the accumulation it cuts off included."""
    loop = loop_of(rows=rows, flat=flat, **length)
    foreseen = list(coming(loop))
    came: list[list[int]] = []
    real = loop.objective.loss

    def loss(model: Any, batch: dict[str, Any]) -> Any:
        came.append(sorted(batch["input_ids"].flatten().tolist()))
        return real(model, batch)

    loop.objective.loss = loss  # type: ignore[method-assign]
    fit(loop)
    ids = encoded_rows(rows)["input_ids"]

    def tokens(batch: list[int]) -> list[int]:
        padding = 0 if flat else sum(max(len(ids[row]) for row in batch) - len(ids[each]) for each in batch)
        return sorted([*(token for row in batch for token in ids[row]), *[0] * padding])

    assert came == [tokens(batch) for batch in foreseen]


def test_looking_ahead_draws_nothing(loop_of: LoopMaker) -> None:
    loop = loop_of()
    before = torch.random.get_rng_state()
    first = list(coming(loop))
    assert list(coming(loop)) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def coming(loop: Any) -> Iterator[list[int]]:
    return coming_batches(loop.objective, loop.pace)


def first_batches(loop_of: LoopMaker, count: int, steps: int) -> list[list[int]]:
    """Row numbers of the steps of a run over ``count`` rows, one micro-batch each."""
    loop = with_rows(loop_of, [4] * count, max_steps=steps, gradient_accumulation=1, batch_size=2)
    return list(coming(loop))


def largest_batch(loop: Any) -> MicroBatch:
    return loop.objective.largest_batch(coming(loop))


def test_a_longest_row_that_never_comes_is_not_planned_for(loop_of: LoopMaker) -> None:
    """400 tokens among rows of 10: three steps of two rows do not reach it, a whole epoch does."""
    drawn = first_batches(loop_of, 40, 3)
    never = next(row for row in range(40) if not any(row in batch for batch in drawn))
    lengths = [10 if row != never else 400 for row in range(40)]
    lengths[drawn[1][0]] = 20
    given = {"gradient_accumulation": 1, "batch_size": 2}
    assert largest_batch(with_rows(loop_of, lengths, max_steps=3, **given)) == MicroBatch(2, 20, (18 + 8) / 40)
    short = with_rows(loop_of, lengths, max_steps=3, flat=True, **given)
    assert largest_batch(short) == MicroBatch(2, 15, (18 + 8) / 30)
    assert largest_batch(with_rows(loop_of, lengths, max_steps=20, **given)).tokens == 400


def test_of_padded_rows_the_longest_decides_and_of_rows_laid_end_to_end_their_sum(loop_of: LoopMaker) -> None:
    drawn = first_batches(loop_of, 40, 3)
    lengths = [4] * 40
    for row, length in zip((*drawn[0], *drawn[1]), (30, 4, 19, 19)):
        lengths[row] = length
    given = {"max_steps": 3, "gradient_accumulation": 1, "batch_size": 2}
    assert largest_batch(with_rows(loop_of, lengths, **given)).tokens == 30
    assert largest_batch(with_rows(loop_of, lengths, flat=True, **given)) == MicroBatch(2, 19, 34 / 38)


def test_an_evaluation_is_foreseen_as_it_is_laid_out(loop_of: LoopMaker) -> None:
    """Several rows lie in one, the last token of each is only asked for, and the micro-batch plays no part."""
    loop = with_rows(loop_of, [5] * 9, [3, 9, 20, 4, 30], batch_size=2)
    assert loop.objective.largest_evaluation() == MicroBatch(1, 61, 56 / 61)
    assert with_rows(loop_of, [5] * 9, [200] * 40).objective.largest_evaluation() == MicroBatch(5, 199, 198 / 199)
    assert with_rows(loop_of, [5] * 9).objective.largest_evaluation() is None


def preferring(columns: dict[str, list[int]], layout: str) -> Preferences:
    """Preferences of rows with these columns, given by their lengths, two rows a batch."""
    kinds = {name: kind for kind, name in enumerate(columns, start=1)}
    rows = Dataset.from_dict({name: [[kinds[name]] * count for count in counts] for name, counts in columns.items()})
    is_paired = "chosen_ids" in columns
    scoring: Any = SimpleNamespace(layout=layout)
    loss = "sigmoid" if is_paired else "apo_zero_unpaired"
    return Preferences(
        scoring=scoring, rows=rows, eval_rows=rows, pad=0, size=2, seed=0, loss_type=loss, beta=0.1, max_length=64
    )


def test_mismatched_answers_of_kto_are_foreseen() -> None:
    """The longest prompt meets the longest answer, which is another's."""
    marked = {"prompt_ids": [9, 2, 2, 2], "completion_ids": [1, 7, 3, 3], "KL_completion_ids": [7, 1, 3, 3]}
    for layout, expected in (("padded", MicroBatch(2, 16, 8 / 32)), ("flat", MicroBatch(2, 10, 8 / 20))):
        objective = preferring(marked, layout)
        assert objective.largest_batch(iter([[0, 1], [2, 3]])) == objective.largest_evaluation() == expected


def test_pairs_are_foreseen_with_their_prompt_once() -> None:
    pairs = {"prompt_ids": [9, 9, 20], "chosen_ids": [1, 1, 15], "rejected_ids": [2, 2, 13]}
    assert preferring(pairs, "padded").largest_evaluation() == MicroBatch(1, 35, 28 / 70)
    # 48 tokens of the last pair, whose sides are 34 tokens long on average, of which 14 are the answer.
    assert preferring(pairs, "shared").largest_evaluation() == MicroBatch(1, 34, 28 / 68)


def test_a_common_beginning_is_foreseen_once() -> None:
    """Of two rows with 20 tokens in common, 5 and 3 are their own; two others have 26 together."""
    common = [7] * 20
    ids = [[*common, *[1] * 5], [*common, *[2] * 3], [3] * 13, [4] * 13]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})
    assert largest(rows, [[0, 1], [2, 3]], "flat") == MicroBatch(2, 24, 46 / 48)
    assert largest(rows, [[0, 1], [2, 3]], "shared") == MicroBatch(2, 14, 1.0)
