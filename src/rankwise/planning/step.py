"""One training step as the trainer takes it, on fake or on real tensors.

B rows, L tokens a row, P positions of a row that are scored, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.planning.workload import Workload

Enter = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask, labels: (B, L); ``positions``: (P,) indices of what is scored, the same in each row."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    positions: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.input_ids, self.attention_mask, self.labels, self.positions


def make_batch(workload: Workload, device: torch.device | str = "cpu") -> Batch:
    """Rows of full length, of which one is padded by a token: the mask of a batch that is not all of one length."""
    B, L = workload.batch_size, workload.max_length
    P = workload.trained_tokens // B
    ids, mask, labels = (torch.ones(B, L, dtype=torch.long, device=device) for _ in range(3))
    mask[-1, -1] = 0
    return Batch(ids, mask, labels, torch.arange(P, device=device))


def autocast_dtype(method: str, workload: Workload) -> torch.dtype | None:
    """The Trainer's mixed precision: full fine-tuning computes in 16 bits over float32 weights."""
    return getattr(torch, workload.dtype) if method == "full" and workload.dtype != "float32" else None


def take_step(
    model: nn.Module, optimizer: Any, batch: Batch, enter: Enter, autocast: torch.dtype | None, loss: Any = None
) -> None:
    """Forward, backward, clipping, optimizer. ``enter`` is told when a phase begins."""
    enter("forward")
    value = (loss or loss_of)(model, batch, autocast)
    enter("backward")
    value.backward()
    del value
    enter("optimizer")
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def loss_of(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """Mean cross-entropy over the scored positions, from logits at those alone where the model can.

    What the trainer computes beside it (entropy and accuracy for its log) is computed here too: it takes memory.
    """
    logits = _logits(model, batch, autocast)
    V = logits.shape[-1]
    chosen = logits.reshape(-1, V)[_scored(batch)].float()
    wanted = batch.labels[:, batch.positions + 1].reshape(-1)
    total = F.cross_entropy(chosen, wanted, reduction="sum")
    _entropy_and_accuracy(chosen.detach(), wanted)
    return total / wanted.numel()


def _logits(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """(B, P, V), or (B, L, V) of a model that cannot leave positions out, cut to (B, P, V)."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    if keeps:
        inputs["logits_to_keep"] = batch.positions
    with torch.autocast(batch.labels.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        logits: Tensor = model(**inputs).logits
    if autocast is not None:
        # accelerate gives the outputs of an autocast model back in float32.
        logits = logits.float()
    return logits if keeps else logits[:, batch.positions]


def _scored(batch: Batch) -> Tensor:
    """Indices of the scored rows of the logits, which the trainer picks by a mask: a copy of them all."""
    return torch.arange(len(batch.labels) * len(batch.positions), device=batch.labels.device)


@torch.no_grad()
def _entropy_and_accuracy(logits: Tensor, wanted: Tensor) -> None:
    log_p = F.log_softmax(logits, dim=-1)
    -(log_p.exp() * log_p).sum(-1).mean()
    (logits.argmax(-1) == wanted).float().mean()
