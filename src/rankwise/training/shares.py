"""Divide batches among processes: together they take the batches of a run in one process, in the same order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import PreTrainedModel

from rankwise.acceleration.loss import scored_positions
from rankwise.adapters.base_layer import is_own, stored_weight
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.low_rank import Adapter
from rankwise.constants import IGNORED
from rankwise.quantization.linear import Linear4bit, is_conv1d
from rankwise.training import ranks
from rankwise.training.batches import KEY, Batch, Counted


class Shares(BatchSampler):
    """Yields the part of process ``rank`` of each batch of ``count * size`` rows: ``size`` consecutive rows.

    A shorter last batch of an epoch is split as evenly as possible. Where it has fewer rows than there are processes,
    each process without a row (``is_idle``) takes the first row with masked labels. accelerate would train on repeated
    rows there.
    """

    def __init__(self, sampler: Sampler[int], size: int, count: int, rank: int) -> None:
        super().__init__(sampler, size * count, drop_last=False)
        self.count, self.rank = count, rank

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield share(batch, self.count, self.rank) or batch[:1]


def share(rows: list[int], count: int, rank: int) -> list[int]:
    """Part ``rank`` of ``rows`` split into ``count`` parts as evenly as possible, longer parts first."""
    size, longer = divmod(len(rows), count)
    start = rank * size + min(rank, longer)
    return rows[start : start + size + (rank < longer)]


def is_idle(rows: int, size: int, count: int, rank: int) -> bool:
    """Whether no row is left for process ``rank`` in the last batch of an epoch."""
    return 0 < rows % (size * count) <= rank


def masked(batch: Batch) -> Batch:
    """The batch with all labels masked, so that a process takes part in a step without contributing to it."""
    labels = torch.full_like(batch["labels"], IGNORED)
    return {**batch, "labels": labels, KEY: Counted(0, 0, labels.new_empty(0))}


def widened(batch: Batch, length: int, pad: int) -> Batch:
    """A batch of rows (B, L), padded further to ``length``."""
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
    """(layer, its active adapter) of the adapted layers."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and module.at_work is not None:
            yield module, module.at_work


def why_masks_differ(model: PreTrainedModel) -> str | None:
    """Why dropout masks of one process cannot be divided among several, or None where they can.

    The operator's mask is a hash of a seed, equal in all processes, and of the position in the whole batch. Any other
    mask is drawn element by element, and depends on the number of rows of a process.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p and not name.endswith("lora_dropout"):
            return f"the base model has dropout ({name})"
    if getattr(model.config.get_text_config(), "attention_dropout", 0):
        return "the base model has dropout (attention_dropout)"
    for layer, adapter in adapters_at_work(model):
        base = layer.base_layer
        if layer.is_head:
            return "the output head is adapted, and it gets the trained tokens only"
        is_whole = adapter.parts is None and is_own(base) and not stored_weight(base).requires_grad
        if adapter.dropout and not (is_whole and (type(base) in (nn.Linear, Linear4bit) or is_conv1d(base))):
            return f"the fast operator does not support every adapted layer (here a {type(base).__name__})"
    return None


def share_batches(loader: DataLoaderShard) -> DataLoaderShard:
    """accelerate's data loader; with several processes, ``Shares`` replaces accelerate's split."""
    if ranks.count() == 1:
        return loader
    split = loader.batch_sampler
    batches = Shares(split.batch_sampler.sampler, split.batch_size, ranks.count(), ranks.rank())
    loader.base_dataloader = DataLoader(
        loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory
    )
    return loader
