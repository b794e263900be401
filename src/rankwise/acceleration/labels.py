"""Answers of models with a head of labels.

B rows, L positions, C labels; z logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from rankwise.foreign import Fields
from rankwise.labels import NUMBER, SEVERAL, SINGLE, Problem

INPUTS = ("input_ids", "token_type_ids")


def laid_out(rows: Sequence[Fields], pad: int) -> dict[str, Tensor]:
    """The model's inputs (B, L), padded on the right: a decoder's head reads the last token that is no padding."""
    found = {name: [torch.tensor(row[name]) for row in rows] for name in INPUTS if name in rows[0]}
    found["attention_mask"] = [torch.ones_like(ids) for ids in found["input_ids"]]
    return {
        name: pad_sequence(values, batch_first=True, padding_value=pad if name == "input_ids" else 0)
        for name, values in found.items()
    }


@torch.no_grad()
def logits_of(
    model: Any, rows: Sequence[Fields], *, pad: int, size: int, autocast: torch.dtype | None = None
) -> Tensor:
    """The logits (n, C) of n rows, float32 on the CPU; rows of similar lengths go together, ``size`` at a time."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    found = []
    for start in range(0, len(order), size):
        inputs = laid_out([rows[place] for place in order[start : start + size]], pad)
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
        found.append(logits.float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


def losses(logits: Tensor, labels: Tensor, problem: Problem) -> Tensor:
    """(B,)  of logits z (B, C):

    one label:       -log softmax(z)_y
    several labels:  mean over C of  -(y log sigma(z) + (1 - y) log sigma(-z))
    a number:        (z - y)^2,  C = 1
    """
    if problem == NUMBER:
        return (logits.squeeze(-1) - labels) ** 2
    if problem == SEVERAL:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    return F.cross_entropy(logits, labels, reduction="none")


def chosen(logits: Tensor, problem: Problem) -> list[Any]:
    """The answers of logits (B, C) in the form of ``Labels.number``: argmax z; z > 0 for each label; z itself."""
    if problem == NUMBER:
        return [float(z) for z in logits[:, 0]]
    if problem == SEVERAL:
        return [[float(z > 0) for z in row] for row in logits.tolist()]
    return [int(place) for place in logits.argmax(-1)]


def probabilities(logits: Tensor, problem: Problem) -> Tensor:
    """softmax z of one label, sigma(z) of several: (B, C) float32."""
    return logits.float().softmax(-1) if problem == SINGLE else logits.float().sigmoid()
