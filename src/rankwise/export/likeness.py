"""Compare the answers of an exported adapter with those of the trained one, on rows that the export did not use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rankwise.adapters import adapter_disabled, remove_adapter, set_adapter
from rankwise.adapters.checkpoint import AdapterFile, load_tensors
from rankwise.adapters.inject import attach
from rankwise.export.portable import Pairs, portable_config, portable_modules, portable_tensors

EXPORTED = "rankwise_exported"
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's token ids and labels, both (T,); -100 is no label."""

    ids: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Likeness:
    """How close the exported adapter is to the trained one, over all tokens and the whole vocabulary."""

    tokens: int
    largest_logit_difference: float
    mean_logit_difference: float
    top1_agreement: float
    # Share of the tokens at which both find the same next token likeliest.
    perplexity_base: float
    perplexity_adapter: float
    perplexity_exported: float


class _Sums:
    """Sums over the losses of one of the three models."""

    def __init__(self) -> None:
        self.loss, self.count = 0.0, 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.loss += cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum").item()
        self.count += int((labels[1:] != IGNORED).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.count) if self.count else math.nan


@torch.no_grad()
def likeness(model: Any, file: AdapterFile, name: str, pairs: Pairs, rows: Sequence[Row]) -> Likeness:
    """Lay the exported pairs over ``model`` beside the adapter ``name``, which is active, and compare."""
    r = next(iter(pairs.values())).r
    attach(model, portable_config(model, file, r), portable_modules(file, r), EXPORTED, trainable=False)
    try:
        load_tensors(model, portable_tensors(model, file, pairs), EXPORTED)
        return _compare(model, name, rows)
    finally:
        remove_adapter(model, EXPORTED)
        set_adapter(model, name)


def _compare(model: Any, name: str, rows: Sequence[Row]) -> Likeness:
    sums = base, trained, exported = _Sums(), _Sums(), _Sums()
    largest, total, agreed, tokens = 0.0, 0.0, 0, 0
    for row in rows:
        ids, labels = row.ids[None].to(model.device), row.labels.to(model.device)
        logits = []
        for active in (name, EXPORTED):
            set_adapter(model, active)
            logits.append(_logits(model, ids))
        with adapter_disabled(model):
            base.add(_logits(model, ids), labels)
        difference = (logits[0] - logits[1]).abs()
        largest, total = max(largest, difference.max().item()), total + difference.mean(dim=-1).sum().item()
        agreed += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        tokens += len(row.ids)
        for one, each in zip(sums[1:], logits):
            one.add(each, labels)
    return Likeness(
        tokens, largest, total / tokens, agreed / tokens, base.perplexity, trained.perplexity, exported.perplexity
    )


def _logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return found
