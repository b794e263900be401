"""Count the targets of a micro-batch while its tensors are on the host, so that counting does not wait for a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rankwise.acceleration.loss import scored_positions
from rankwise.constants import IGNORED
from rankwise.ops.elementwise_checks import check_targets

KEY = "counted"
# A micro-batch as the Trainer passes it: tensors under transformers' names, and rankwise's counts of them.
Batch = dict[str, Any]
# The divisor of a step's loss: its number of trained tokens, or None.
Items = Tensor | int | None
Samples = tuple[list[Batch], Items]


@dataclasses.dataclass(frozen=True)
class Counted:
    """The targets of one micro-batch."""

    # Number of tokens that are not padding.
    tokens: int
    examples: int
    # The result of `scored_positions`: (P,) int64, on the device of the labels.
    scored: Tensor
    # Number of tokens, padding included, that processes of lower rank have in the same micro-batch.
    rows_before: int = 0

    def to(self, *to: Any, **how: Any) -> Counted:
        """Move to a device like a tensor. accelerate calls this method."""
        return dataclasses.replace(self, scored=self.scored.to(*to, **how))


@dataclasses.dataclass(frozen=True)
class Counting:
    """A collator that adds a ``Counted`` to each batch of another collator."""

    collate: Callable[[list[Any]], Batch]
    vocabulary: int

    def __call__(self, examples: list[Any]) -> Batch:
        """Collate a batch. Raises QuantizationError (RW621) for a label that is not a token number."""
        batch = self.collate(examples)
        check_targets(batch["labels"].flatten(), self.vocabulary, IGNORED)
        return {**batch, KEY: counted(batch)}


def counted(batch: Batch) -> Counted:
    """The counts of a batch of trl's collator: rows (B, L) with an attention mask, or concatenated rows (1, T)."""
    if "attention_mask" in batch:
        tokens, examples = int(batch["attention_mask"].sum()), len(batch["input_ids"])
    else:
        # Position 0 marks the start of a row.
        tokens, examples = batch["input_ids"].numel(), int((batch["position_ids"] == 0).sum())
    return Counted(tokens, examples, scored_positions(batch["labels"]))
