"""The loss where trl's fused output head would be wrong, and the tests for when that is.

B batch, L positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class LossParts:
    """A loss and what trl reports beside it, all over the trained positions."""

    loss: Tensor
    entropy: float
    accuracy: float
    aux_loss: Tensor | None


def fused_head_is_right(model: nn.Module) -> bool:
    """Whether ``hidden @ head.weight.T + head.bias`` is what the head computes.

    trl's fused head reads the weight and never calls the module, so that an adapter on the head, a trained copy of it
    or a quantized head would be left out without a word.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return type(head) is nn.Linear


def loss_from_logits(
    model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None, label_smoothing: float = 0.0
) -> LossParts:
    """Sum over trained positions of  (1 - e) nll + e mean_V(-log p),  over ``num_items`` (default: their number).

    One forward through the model's own head. ``inputs`` holds labels (B, L) with -100 where nothing is trained;
    position i is scored on label i + 1.
    """
    labels = inputs["labels"]
    outputs: Any = model(**{key: value for key, value in inputs.items() if key != "labels"})
    targets = labels[:, 1:]
    trained = targets != -100
    logits, wanted = outputs.logits[:, :-1][trained].float(), targets[trained]
    total = F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=label_smoothing)
    count = trained.sum() if num_items is None else torch.as_tensor(num_items)
    entropy, accuracy = _entropy_and_accuracy(logits.detach(), wanted)
    return LossParts(total / count.clamp(min=1), entropy, accuracy, getattr(outputs, "aux_loss", None))


def trained_positions(labels: Tensor) -> Tensor:
    """How many positions of labels (B, L) are scored, a scalar tensor."""
    return (labels[:, 1:] != -100).sum()


@torch.no_grad()
def _entropy_and_accuracy(logits: Tensor, wanted: Tensor) -> tuple[float, float]:
    if not len(wanted):
        return 0.0, 0.0
    log_p = F.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return entropy.item(), (logits.argmax(-1) == wanted).float().mean().item()
