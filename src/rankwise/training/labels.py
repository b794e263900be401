"""Training on labels: a head on the model's last hidden states answers a text with one label, several, or a number.

B rows, L positions, C labels.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.acceleration.labels import chosen, laid_out, losses
from rankwise.labels import SINGLE, Labels, measures
from rankwise.training import ranks
from rankwise.training.loop import KEY, Batch, Counted, Loss, Row, on_device, shuffled


@dataclasses.dataclass
class Classification:
    """The objective classify. ``size``: rows of a micro-batch of all processes."""

    rows: Dataset
    eval_rows: Dataset | None
    labels: Labels
    pad: int
    size: int
    seed: int

    silence_is_normal: ClassVar[bool] = False
    in_words: ClassVar[str] = "of labels, from the head's logits"

    @property
    def shown(self) -> Mapping[str, str]:
        return {"accuracy": "accuracy"} if self.labels.problem == SINGLE else {}

    def order(self, epoch: int) -> list[list[int]]:
        return shuffled(len(self.rows), self.size, self.seed + epoch)

    def collate(self, rows: Sequence[Row]) -> Batch:
        batch: Batch = laid_out(rows, self.pad)
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        return {**batch, KEY: Counted(len(rows), int(batch["attention_mask"].sum()), len(rows))}

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        return batches

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        logits, each = self._answered(model, batch)
        if self.labels.problem != SINGLE:
            return Loss(each.sum())
        right = (logits.detach().argmax(-1) == batch["labels"]).sum()
        return Loss(each.sum(), figures={"accuracy": (right, len(each))})

    def _answered(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and losses (B,)."""
        inputs = {name: value for name, value in batch.items() if name not in (KEY, "labels")}
        logits = model(**inputs).logits.float()
        return logits, losses(logits, batch["labels"], self.labels.problem)

    def means(self, figures: dict[str, float]) -> dict[str, float]:
        return figures

    def evaluate(self, model: PreTrainedModel, pause: Callable[[], None]) -> dict[str, float]:
        """The mean loss over rows, and how well all answers agree with the labels."""
        assert self.eval_rows is not None
        found: list[tuple[float, Any, Any]] = []
        for start in range(0, len(self.eval_rows), self.size):
            own = ranks.share(list(range(len(self.eval_rows)))[start : start + self.size])
            if own:
                rows = [self.eval_rows[place] for place in own]
                batch = on_device(self.collate(rows), model.device)
                logits, each = self._answered(model, batch)
                targets = [row["label"] for row in rows]
                found += zip(each.tolist(), targets, chosen(logits, self.labels.problem))
            pause()
        losses_of_all, targets_of_all, answers = zip(*itertools.chain.from_iterable(ranks.gathered(found)))
        agreement = measures(targets_of_all, answers, self.labels.problem)
        loss = sum(losses_of_all) / len(losses_of_all)
        return {"eval_loss": loss, **{f"eval_{name}": value for name, value in agreement.items()}}
