"""The loss from the model's own logits, and the test whether trl's fused output head may replace it.

B batch, L positions, P positions that any row of the batch trains on, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.acceleration.scoring import Target, trained_target
from rankwise.constants import IGNORED
from rankwise.training.batches import Batch, Items


@dataclasses.dataclass(frozen=True)
class LossParts:
    """A loss and the figures that trl reports with it, all over the trained positions."""

    loss: Tensor
    entropy: Tensor | float
    accuracy: Tensor | float
    positions: int
    aux_loss: Tensor | None


def fused_head_is_right(model: nn.Module) -> bool:
    """Whether the head computes ``hidden @ head.weight.T + head.bias``, as trl's fused head does.

    trl's fused head reads the weight and never calls the module. The weight of an adapted head lacks dropout, and that
    of a quantized head is packed, so only a plain ``nn.Linear`` is accepted.
    """
    return type(model.get_output_embeddings()) is nn.Linear  # type: ignore[operator]


def loss_from_logits(model: nn.Module, inputs: Batch, num_items: Items, label_smoothing: float = 0.0) -> LossParts:
    """The sum over trained positions of  (1 - e) nll + e mean_V(-log p),  divided by ``num_items`` (default: their
    number), with e the label smoothing.

    One forward pass through the model's own head, at the P positions only where the model supports logits_to_keep.
    ``inputs`` holds labels (B, L), -100 where nothing is trained; position i is scored on label i + 1.
    """
    trained = inputs["labels"][:, 1:] != IGNORED
    positions = trained.any(dim=0).nonzero().squeeze(1) if keeps_positions(model) else None
    given = {key: value for key, value in inputs.items() if key != "labels"}
    if positions is not None:
        given["logits_to_keep"] = positions
    outputs: Any = model(**given)
    logits, chosen = outputs.logits, trained
    if positions is None:
        logits = logits[:, :-1]
    else:
        chosen = trained[:, positions]
    logits, wanted = logits[chosen].float(), inputs["labels"][:, 1:][trained]
    total = F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=label_smoothing)
    count = trained.sum() if num_items is None else torch.as_tensor(num_items)
    entropy, accuracy = _entropy_and_accuracy(logits.detach(), wanted)
    return LossParts(total / count.clamp(min=1), entropy, accuracy, len(wanted), getattr(outputs, "aux_loss", None))


def keeps_positions(model: nn.Module) -> bool:
    """Whether the model can compute its logits at chosen positions only."""
    inner = getattr(model, "module", model)
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


@torch.no_grad()
def _entropy_and_accuracy(logits: Tensor, wanted: Tensor) -> tuple[float, float]:
    if not len(wanted):
        return 0.0, 0.0
    log_p = F.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return entropy.item(), (logits.argmax(-1) == wanted).float().mean().item()


def evaluation_targets(dataset: Dataset) -> list[Target]:
    """The scored tokens of an evaluation's encoded rows. A row whose only trained token is its first has none."""
    trained = ([label != IGNORED for label in row] for row in dataset["labels"])
    return [target for target in map(trained_target, dataset["input_ids"], trained) if target is not None]
