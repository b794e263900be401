"""Log-probabilities of generated tokens, from chunks of the model's logits.

B rows, L positions, P scored positions of all rows, T tokens without padding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.acceleration import LossOptions, fused_head
from rankwise.acceleration.loss import scored_positions


@dataclasses.dataclass(frozen=True)
class Scored:
    """Values at the scored positions, in the order of rows."""

    # (P,), differentiable.
    log_probs: Tensor
    # Its mean, where it was asked for.
    entropy: Tensor | None
    # The loss that balances experts, where it was asked for.
    aux_loss: Tensor | None


def scored(
    model: nn.Module, inputs: dict[str, Tensor], *, temperature: float, want_entropy: bool, want_aux_loss: bool = False
) -> Scored:
    """log p of each label i + 1 at position i, of logits divided by the temperature.

    ``inputs``: those of a model, with labels (B, L) that are -100 where nothing is scored.
    """
    given: dict[str, Any] = {**inputs, "use_cache": False}
    if want_aux_loss:
        given["output_router_logits"] = True
    positions = scored_positions(inputs["labels"])
    head = fused_head(model)
    if head is None or (want_aux_loss and head.router_weight is None):
        return _from_logits(model, given, positions, temperature, want_entropy)
    options = LossOptions(want_stats=want_entropy, want_log_probs=True, temperature=temperature, scored=positions)
    outputs = model(**given, loss_options=options)
    sums = options.found[-1]
    assert sums.log_probs is not None, "asked for"
    entropy = sums.entropy / max(1, len(positions)) if want_entropy and sums.entropy is not None else None
    return Scored(sums.log_probs, entropy, getattr(outputs, "aux_loss", None))


def _from_logits(
    model: nn.Module, given: dict[str, Any], positions: Tensor, temperature: float, want_entropy: bool
) -> Scored:
    """The same from the model's own logits: for models that were not made fast, or whose head alone does not make
    the logits.
    """
    labels = given.pop("labels").flatten()
    outputs = model(**given)
    logits = outputs.logits.flatten(0, 1).index_select(0, positions).float() / temperature
    log_p = F.log_softmax(logits, -1)
    tokens = log_p.gather(1, labels.index_select(0, positions + 1)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).detach().sum(-1).mean() if want_entropy else None
    return Scored(tokens, entropy, getattr(outputs, "aux_loss", None))


def without_padding_in_front(ids: Tensor, mask: Tensor, labels: Tensor, *, flat: bool) -> dict[str, Tensor]:
    """Rows (B, L) with padding at both ends as inputs of a model: laid end to end where ``flat``, else padded on the
    right.

    Positions count from a row's first token, as in generation.
    """
    if flat:
        real = mask.bool()
        positions = (mask.cumsum(1) - 1)[real]
        return {"input_ids": ids[real][None], "position_ids": positions[None], "labels": labels[real][None]}
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    length = ids.shape[1]
    # argmax gives the first of equal ones.
    columns = (torch.arange(length, device=ids.device) + mask.argmax(1, keepdim=True)) % length
    longest = int(mask.sum(1).max())
    return {name: tensor.gather(1, columns)[:, :longest] for name, tensor in rows.items()}
