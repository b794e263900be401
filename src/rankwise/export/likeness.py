"""Compare an exported adapter with the trained one, on rows that the export did not use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rankwise.adapters import adapter_disabled, remove_adapter, set_adapter
from rankwise.adapters.checkpoint import AdapterFile
from rankwise.constants import IGNORED
from rankwise.export.pairs import Pairs
from rankwise.export.portable import attach_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORTED = "rankwise_exported"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's token ids and labels, both (T,); -100 is not a label."""

    ids: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Likeness:
    """How close the exported adapter is to the trained one, over all tokens and the whole vocabulary."""

    tokens: int
    largest_logit_difference: float
    mean_logit_difference: float
    # Share of the tokens at which both have the same argmax.
    top1_agreement: float
    perplexity_base: float
    perplexity_adapter: float
    perplexity_exported: float
    # Mean difference of a label's log-probability, in nats.
    difference: float


@torch.no_grad()
def keeps_perplexity(
    model: PreTrainedModel, file: AdapterFile, name: str, rows: Sequence[Row], share: float
) -> Callable[[Pairs], bool]:
    """A function that tests whether pairs keep the perplexity of ``rows`` within ``share`` of the trained adapter's.

    |mean d| + 2 standard errors <= log(1 + share), where d are the differences of the labels' losses. The errors take
    at most half of that: few rows, or rounding to 16 bits, would otherwise refuse every rank.
    """
    trained, most = _losses(model, rows), math.log1p(share)

    def keeps(pairs: Pairs) -> bool:
        with _laid_over(model, file, name, pairs):
            d = _losses(model, rows) - trained
        return float(d.mean().abs() + min(2 * d.std() / len(d) ** 0.5, most / 2)) <= most

    return keeps


@torch.no_grad()
def likeness(model: PreTrainedModel, file: AdapterFile, name: str, pairs: Pairs, rows: Sequence[Row]) -> Likeness:
    """Compare the exported pairs with the active adapter ``name``."""
    with _laid_over(model, file, name, pairs):
        return _compare(model, name, rows)


@contextmanager
def _laid_over(model: PreTrainedModel, file: AdapterFile, name: str, pairs: Pairs) -> Iterator[None]:
    """A context in which the pairs are the active adapter instead of ``name``."""
    attach_pairs(model, file, pairs, EXPORTED, trainable=False)
    try:
        yield
    finally:
        remove_adapter(model, EXPORTED)
        set_adapter(model, name)


def _compare(model: PreTrainedModel, name: str, rows: Sequence[Row]) -> Likeness:
    losses: tuple[list[Tensor], ...] = ([], [], [])
    largest, total, agreed, tokens = 0.0, 0.0, 0, 0
    for row in rows:
        with adapter_disabled(model):
            base = _logits(model, row)
        set_adapter(model, name)
        trained = _logits(model, row)
        set_adapter(model, EXPORTED)
        exported = _logits(model, row)
        difference = (trained - exported).abs()
        largest, total = max(largest, difference.max().item()), total + difference.mean(dim=-1).sum().item()
        agreed += int((trained.argmax(-1) == exported.argmax(-1)).sum())
        tokens += len(row.ids)
        for found, logits in zip(losses, (base, trained, exported)):
            found.append(_loss(logits, row))
    lost = float((torch.cat(losses[1]) - torch.cat(losses[2])).abs().mean())
    base_perplexity, *others = (float(torch.cat(one).mean().exp()) for one in losses)
    return Likeness(tokens, largest, total / tokens, agreed / tokens, base_perplexity, others[0], others[1], lost)


def _losses(model: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    """The loss of every label, row by row."""
    return torch.cat([_loss(_logits(model, row), row) for row in rows])


def _loss(logits: Tensor, row: Row) -> Tensor:
    labels = row.labels[1:].to(logits.device)
    return cross_entropy(logits[:-1][labels != IGNORED], labels[labels != IGNORED], reduction="none")


def _logits(model: PreTrainedModel, row: Row) -> Tensor:
    return model(input_ids=row.ids[None].to(model.device), use_cache=False).logits[0].float()
