"""The rows of one of several processes. Together the processes take the batches of one process, in its order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader

from rankwise.acceleration.loss import scored_positions
from rankwise.adapters.base_layer import is_own, stored_weight
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.operator import Adapter
from rankwise.constants import IGNORED
from rankwise.quantization.linear import Linear4bit, is_conv1d
from rankwise.training import ranks
from rankwise.training.batches import KEY, Counted


class Shares(BatchSampler):
    """The part of process ``rank`` of each batch of ``count * size`` rows: ``size`` rows, one process after the other.

    The last batch of an epoch may be shorter. It is then split as evenly as possible. Where it has fewer rows than
    there are processes, the processes without a row (``is_idle``) take its first row, of which they learn nothing.
    accelerate would repeat rows there, and one process does not.
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


def is_idle(rows: int, size: int, count: int, rank: int) -> bool:
    """Whether no row is left for process ``rank`` in the last batch of an epoch."""
    return 0 < rows % (size * count) <= rank


def masked(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch of a process that takes part in a step and changes nothing: all labels are masked."""
    labels = torch.full_like(batch["labels"], IGNORED)
    return {**batch, "labels": labels, KEY: Counted(0, 0, labels.new_empty(0))}


def widened(batch: dict[str, Any], length: int, pad: int) -> dict[str, Any]:
    """A batch of padded rows (B, L) with padding up to ``length``."""
    fills = {"input_ids": pad, "labels": IGNORED}
    missing = length - batch["input_ids"].shape[1]
    if not missing:
        return batch
    wide = {
        name: F.pad(value, (0, missing), value=fills.get(name, 0)) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    return {**wide, KEY: dataclasses.replace(batch[KEY], scored=scored_positions(wide["labels"]))}


def adapters_at_work(model: nn.Module) -> Iterator[tuple[AdaptedLayer, Adapter]]:
    """The adapted layers with their adapters."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and module.at_work is not None:
            yield module, module.at_work


def why_masks_differ(model: Any) -> str | None:
    """Why dropout masks of one process cannot be divided among several, or None where they can.

    A mask of our operator is a hash of a seed and of the place in the whole batch, and all processes draw one seed.
    Any other mask is drawn element by element, so that it depends on how many rows a process has.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p and not name.endswith("lora_dropout"):
            return f"the model itself drops ({name})"
    if getattr(model.config.get_text_config(), "attention_dropout", 0):
        return "the model itself drops (attention_dropout)"
    for layer, adapter in adapters_at_work(model):
        base = layer.base_layer
        if layer.is_head:
            return "the output head is adapted, which only sees the trained tokens"
        is_whole = adapter.parts is None and is_own(base) and not stored_weight(base).requires_grad
        if adapter.dropout and not (is_whole and (type(base) in (nn.Linear, Linear4bit) or is_conv1d(base))):
            return f"the operator of the adapters does not take every layer (a {type(base).__name__} here)"
    return None


def share_batches(loader: Any) -> Any:
    """accelerate's loader of rows; among several processes with ``Shares`` in place of accelerate's own split."""
    if ranks.count() == 1:
        return loader
    split = loader.batch_sampler
    batches = Shares(split.batch_sampler.sampler, split.batch_size, ranks.count(), ranks.rank())
    loader.base_dataloader = DataLoader(
        loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory
    )
    return loader
