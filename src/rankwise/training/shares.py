"""The rows of one of several processes. Together the processes take the batches of one process, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from rankwise.constants import IGNORED
from rankwise.training.batches import KEY, Counted


class Shares(BatchSampler):
    """The part of process ``rank`` of each batch of ``count * size`` rows: ``size`` rows, one process after the other.

    The last batch of an epoch may be shorter. It is then split as evenly as possible. Where it has fewer rows than
    there are processes, the processes without a row take its first row, and ``Remainder`` masks its labels. accelerate
    would repeat rows there, and one process does not.
    """

    def __init__(self, sampler: Any, size: int, count: int, rank: int) -> None:
        super().__init__(sampler, size * count, drop_last=False)
        self.count, self.rank = count, rank

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield share(batch, self.count, self.rank) or batch[:1]


def share(rows: list[Any], count: int, rank: int) -> list[Any]:
    """Part ``rank`` of ``count`` of rows that are split as evenly as possible; the first parts are the longer ones."""
    size, longer = divmod(len(rows), count)
    start = rank * size + min(rank, longer)
    return rows[start : start + size + (rank < longer)]


class Remainder:
    """The batch of a process that has no row of its own in the last batch of an epoch.

    All its labels are masked, so that the process takes part in the step and changes nothing.
    """

    def __init__(self, rows: int, size: int, count: int, rank: int) -> None:
        self.is_idle = 0 < rows % (size * count) <= rank

    def masked(self, batch: dict[str, Any]) -> dict[str, Any]:
        labels = torch.full_like(batch["labels"], IGNORED)
        return {**batch, "labels": labels, KEY: Counted(0, 0, labels.new_empty(0))}


def share_batches(loader: Any, size: int, count: int, rank: int) -> Any:
    """accelerate's loader of training rows, with ``Shares`` in place of accelerate's own split."""
    batches = Shares(loader.batch_sampler.sampler, size, count, rank)
    loader.base_dataloader = DataLoader(
        loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory
    )
    return loader
