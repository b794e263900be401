"""The micro-batches of a run: the rows of each, their layout in memory, and which is the largest.

B rows, L positions, T tokens of all rows laid end to end.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from rankwise.acceleration.layouts import (
    Answered,
    KeyRanges,
    Layout,
    end_to_end,
    laid_once,
    laid_tokens,
    padded,
    parts_of,
)
from rankwise.acceleration.loss import scored_positions
from rankwise.constants import IGNORED
from rankwise.data.objectives import ANSWER_IDS
from rankwise.training import ranks

KEY = "counted"
# An encoded row; a micro-batch: tensors under the model's names, and its ``Counted`` under KEY.
Row = dict[str, Any]
Batch = dict[str, Any]
# A sum and the weight that it is divided by: values on the device are read once a step.
Figures = Mapping[str, tuple[Tensor | float, Tensor | float]]
# Rows that are packed together, as in trl.
PACKED_AT_ONCE = 1000
# Rows whose lengths are read together.
ROWS_AT_ONCE = 10_000
# The batches with the most tokens, of which it is computed how many are laid once.
LARGEST_TRIED = 64


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a micro-batch holds, counted while its tensors are on the host, so that nothing waits for a GPU."""

    # The number that the sum of losses is divided by: trained tokens, pairs, answers.
    targets: float
    # Number of tokens that are not padding.
    tokens: int
    examples: int
    # The result of `scored_positions`: (P,) int64, on the device of the labels; of demonstrations only.
    scored: Tensor | None = None
    # The tokens after these (P,), where the batch has no labels.
    wanted: Tensor | None = None

    def to(self, *to: Any, **how: Any) -> Counted:
        """Move to a device like a tensor."""
        moved = {
            name: value.to(*to, **how) for name in ("scored", "wanted") if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **moved)


def shuffled(rows: int, size: int, seed: int) -> list[list[int]]:
    """Row numbers in random order, by micro-batches of ``size``."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[start : start + size] for start in range(0, rows, size)]


def in_order(rows: int, size: int) -> list[list[int]]:
    """Row numbers in the order of the data, by micro-batches of ``size``."""
    return [[*range(start, min(start + size, rows))] for start in range(0, rows, size)]


def means_of(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each figure that was read, and the margin between those of better and of worse answers."""
    means = {name: total / weight for name, (total, weight) in figures.items() if weight}
    if "reward_chosen" in means and "reward_rejected" in means:
        means["reward_margin"] = means["reward_chosen"] - means["reward_rejected"]
    return means


def without_rows(batch: Batch) -> Batch:
    """A batch with which a process takes part in a step without contributing to it."""
    return {**batch, KEY: dataclasses.replace(batch[KEY], targets=0, tokens=0, examples=0)}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``."""
    movable = (Tensor, Counted, Answered, KeyRanges)
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, movable) else value
        for name, value in batch.items()
    }


# --- layouts ---


def laid_out(rows: Sequence[Row], pad: int, layout: Layout) -> tuple[Batch, Counted]:
    """Rows with labels: padded (B, L), or end to end (1, T), rows that are packed already too. No row's first token is
    trained on. Where a beginning is laid once, the counts hold what the labels would, at each row's own places."""
    if layout == "padded":
        batch = padded(rows, {"input_ids": pad, "labels": IGNORED})
        scored = scored_positions(batch["labels"])
        return batch, Counted(len(scored), int(batch["attention_mask"].sum()), len(rows), scored)
    ids = [row["input_ids"] for row in rows]
    lengths = [length for row in rows for length in row.get("seq_lengths", [len(row["input_ids"])])]
    if layout == "shared":
        batch, slots = laid_once(ids)
        if "attention_mask" in batch:
            trained = [
                [place for place, label in enumerate(row["labels"]) if place and label != IGNORED] for row in rows
            ]
            scored = torch.tensor([own[place - 1] for own, places in zip(slots, trained) for place in places])
            wanted = torch.tensor([row["labels"][place] for row, places in zip(rows, trained) for place in places])
            return batch, Counted(len(scored), sum(lengths), len(rows), scored.long(), wanted.long())
    batch = end_to_end(ids, lengths)
    labels = torch.tensor(list(itertools.chain.from_iterable(row["labels"] for row in rows)))
    labels[batch["cu_seq_lens_q"][:-1].long()] = IGNORED
    scored = scored_positions(labels[None])
    return {**batch, "labels": labels[None]}, Counted(len(scored), sum(lengths), len(lengths), scored)


def packed(rows: Dataset, length: int, seed: int) -> Dataset:
    """Rows of at most ``length`` tokens that hold several of the shuffled ``rows`` each: the longest first, each into
    the fullest row into which it fits (best fit decreasing). ``seq_lengths`` holds the lengths within a row.
    """
    rows = rows.select_columns(["input_ids", "labels"]).shuffle(seed=seed)
    made: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for start in range(0, len(rows), PACKED_AT_ONCE):
        part = rows[start : start + PACKED_AT_ONCE]
        for members in _bins([len(ids) for ids in part["input_ids"]], length):
            for name in ("input_ids", "labels"):
                made[name].append(list(itertools.chain.from_iterable(part[name][member] for member in members)))
            made["seq_lengths"].append([len(part["input_ids"][member]) for member in members])
    return Dataset.from_dict(made).shuffle(seed=seed)


def _bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The indices of ``lengths`` in each bin. Of bins with as much left, the earliest is filled first."""
    bins: list[list[int]] = []
    # (what is left, since which turn, bin), in order.
    there: list[tuple[int, int, list[int]]] = []
    for turn, index in enumerate(np.argsort(-np.asarray(lengths), kind="stable").tolist()):
        place = bisect.bisect_left(there, (lengths[index],))
        left, _, chosen = there.pop(place) if place < len(there) else (capacity, 0, [])
        if not chosen:
            bins.append(chosen)
        chosen.append(index)
        if left > lengths[index]:
            bisect.insort(there, (left - lengths[index], turn, chosen))
    return bins


# --- the memory plan ---


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The properties of a micro-batch on which memory depends."""

    # Number of rows; a pair of answers is one row.
    rows: int
    # Tokens of a row, or of one side of a pair with its prompt: of the longest if rows are padded, the mean if they are
    # concatenated.
    tokens: int
    # Share of all tokens that are in the loss.
    trained_share: float


def own_parts(batches: Iterable[list[int]]) -> Iterator[list[int]]:
    """This process's part of each batch: one row at least."""
    return (ranks.share(batch) or batch[:1] for batch in batches)


def largest(
    dataset: Dataset,
    batches: Iterable[list[int]],
    layout: Layout,
    *,
    answers: Sequence[str] = ANSWER_IDS,
) -> MicroBatch:
    """The batch with the most tokens, padding included, and among these the one with the longest row.

    ``answers``: the columns that hold answers, where a data set has them.
    """
    lengths: list[list[int]] = _lengths(dataset, answers=answers).tolist()
    sides = len(lengths[0])

    def size(batch: list[int]) -> tuple[int, int]:
        longest = max(max(lengths[row]) for row in batch)
        return sum(sum(lengths[row]) for row in batch) if layout != "padded" else longest * len(batch) * sides, longest

    def laid(batch: list[int]) -> tuple[int, int]:
        return laid_tokens(parts_of(token_rows(dataset, batch, answers))), size(batch)[1]

    if layout == "shared":
        # Rows share about as much in one batch as in another.
        found = max(heapq.nlargest(LARGEST_TRIED, batches, key=size), key=laid)
        tokens, longest = laid(found)
    else:
        found = max(batches, key=size)
        tokens, longest = size(found)
    sequences, rows = len(found) * sides, dataset.select(found)
    trained = sum(len(row.get(name, ())) for row in rows for name in answers)
    trained += sum(label != IGNORED for row in rows for label in row.get("labels", ()))
    if layout != "shared" or sides == 1:
        length = longest if layout == "padded" else math.ceil(tokens / sequences)
    else:
        # A plan's pairs share their prompts, and nothing else.
        length = math.ceil((tokens - trained / sides) / len(found))
    return MicroBatch(len(found), length, min(1.0, max(trained, 1) / (sequences * length)))


def token_rows(dataset: Dataset, batch: list[int], answers: Sequence[str] = ANSWER_IDS) -> list[list[int]]:
    """The tokens of these rows, of each prompt with each of its answers."""
    rows = dataset[batch]
    if "input_ids" in rows:
        return list(rows["input_ids"])
    return [p + a for name in answers if name in rows for p, a in zip(rows["prompt_ids"], rows[name])]


def longest_row(dataset: Dataset) -> int:
    """The number of tokens of the longest row in an encoded data set."""
    return int(_lengths(dataset).max())


def _lengths(dataset: Dataset, answers: Sequence[str] = ANSWER_IDS) -> np.ndarray:
    """The number of tokens of every row, for each side of a pair: (rows, sides); without ``answers`` of the prompts."""
    import pyarrow.compute as pc

    def of(name: str) -> np.ndarray:
        columns = dataset.select_columns([name]).with_format("arrow")
        return np.concatenate([pc.list_value_length(table[name]).to_numpy() for table in columns.iter(ROWS_AT_ONCE)])

    if "input_ids" in dataset.column_names:
        return of("input_ids")[:, None]
    prompts, sides = of("prompt_ids"), [name for name in answers if name in dataset.column_names]
    return np.stack([of(name) + prompts for name in sides] or [prompts], axis=1)
