"""Answers that are labels, to the rows of a comparison: how well they agree with the rows' own, example by example.

One label: accuracy, F1, Matthews' correlation; several: accuracy, F1; numbers: Pearson's correlation; and the loss of
training. Accuracy and loss are means over examples; the others are of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.acceleration.loss import chosen, logits_of, losses
from rankwise.data import Rows
from rankwise.data.objectives import encode_labelled
from rankwise.evaluation.engine import Engine
from rankwise.evaluation.errors_of_means import mean_of
from rankwise.evaluation.record import Example, text_sha256
from rankwise.evaluation.tasks.base import Summary, Task, Tell, answer_in_batches
from rankwise.foreign import JsonObject
from rankwise.labels import NUMBER, SEVERAL, SINGLE, Labels, in_words, measures
from rankwise.models.load import table_rows
from rankwise.reports.numbers import shortened

# Of a text in the record.
SHOWN_CHARACTERS = 500
# Number of rows between two writes to disk, and of a batch.
ROWS_AT_ONCE, BATCH = 64, 16
MEASURED = {SINGLE: ("accuracy", "f1", "mcc"), SEVERAL: ("accuracy", "f1"), NUMBER: ("pearson",)}


class LabelAnswers(Task):
    """``rows`` with labels, all of them among ``labels``. Texts are cut at ``max_length`` tokens."""

    name = "labels"

    def __init__(self, rows: Rows, labels: Labels, *, max_length: int) -> None:
        self.rows, self.labels, self.max_length = rows, labels, max_length
        self.primary = MEASURED[labels.problem][0]
        self.higher_is_better = {**dict.fromkeys(MEASURED[labels.problem], True), "loss": False}

    def describe(self) -> JsonObject:
        return {"max_length": self.max_length, "labels": self.labels.to_json(), "rows": len(self.rows)}

    @property
    def data_sha256(self) -> str:
        return self.rows.sha256

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        limit = min(self.max_length, table_rows(engine.model) or self.max_length)
        table = encode_labelled(self.rows, engine.tokenizer, self.labels, max_length=limit, name="eval").dataset
        texts = ["\n".join(filter(None, (row.text, row.completion))) for row in self.rows]
        repeated, is_number = len(set(texts)) < len(texts), self.labels.problem == NUMBER
        batches = [range(start, len(table))[:ROWS_AT_ONCE] for start in range(0, len(table), ROWS_AT_ONCE)]

        def answer(batch: Sequence[int]) -> list[Example]:
            rows = [table[number] for number in batch]
            logits = logits_of(engine.model, rows, pad=engine.pad, size=BATCH, autocast=engine.autocast)
            answers = chosen(logits, self.labels.problem)
            each = losses(logits, torch.tensor([row["label"] for row in rows]), self.labels.problem).tolist()
            return [
                Example(
                    str(number),
                    shortened(texts[number], SHOWN_CHARACTERS),
                    self._words(said),
                    {"loss": loss} if is_number else {"accuracy": float(said == row["label"]), "loss": loss},
                    [self._words(row["label"])],
                    text_sha256(texts[number]) if repeated else None,
                    {"answer": said, "label": row["label"]},
                )
                for number, row, said, loss in zip(batch, rows, answers, each, strict=True)
            ]

        return answer_in_batches([str(number) for number in range(len(table))], batches, answer, folder, tell)

    def _words(self, answer: Any) -> str:
        words = self.labels.words(answer)
        if isinstance(words, list):
            return ", ".join(words) or "none"
        return f"{words:.4g}" if isinstance(words, float) else str(words)

    def summarize(self, examples: Sequence[Example]) -> Summary:
        targets, answers = ([example.details[name] for example in examples] for name in ("label", "answer"))
        found = measures(targets, answers, self.labels.problem)
        means = {name: mean_of([example.scores[name] for example in examples]) for name in examples[0].scores}
        metrics = {**{name: found[name] for name in MEASURED[self.labels.problem]}, "loss": means["loss"].value}
        errors = {name: means[name].standard_error if name in means else None for name in metrics}
        return Summary(metrics, errors, [in_words(found, len(examples))])


class Constant(nn.Module):
    """The best constant answer to rows of these targets, in the place of a model: the labels' frequencies, or the
    mean of numbers."""

    def __init__(self, targets: Sequence[Any], labels: Labels) -> None:
        super().__init__()
        y = torch.tensor(targets)
        if labels.problem == SINGLE:
            z = (torch.bincount(y, minlength=len(labels.names)) / len(y)).log()
        else:
            z = y.mean(0).logit(eps=1e-6) if labels.problem == SEVERAL else y.mean(0, keepdim=True)
        self.z, self.device = z, z.device

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.z.expand(len(input_ids), -1))
