"""One training step, computed as the trainer computes it, on fake or on real tensors.

B rows, L tokens a row, P positions of a row that are scored, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.acceleration import LossOptions, fused_head
from rankwise.acceleration.sharding import average_gradients
from rankwise.compat.torch import is_unit
from rankwise.constants import IGNORED
from rankwise.ops.selection import stands_on_card
from rankwise.planning import trl_head
from rankwise.planning.workload import Workload

Enter = Callable[[str], None]
LossOf = Callable[[nn.Module, "Batch", torch.dtype | None], Tensor]


@dataclasses.dataclass(frozen=True)
class Batch:
    """``inputs``: the model's inputs without labels; ``labels`` (B, L), -100 where nothing is scored."""

    inputs: Mapping[str, object]
    labels: Tensor
    # (P,): what is scored, the same in each row.
    positions: Tensor
    label_smoothing: float = 0.0


def make_batch(workload: Workload, device: torch.device | str = "cpu", *, flat: bool = False) -> Batch:
    """Rows of full length. The last of several rows has one token of padding, as in batches of rows with different
    lengths.

    ``flat``: the rows are concatenated into one row with their bounds, in the cases where the trainer does so.
    """
    B, L = workload.sequences, workload.max_length
    P = workload.trained_tokens // B
    ids, mask, labels = (torch.ones(B, L, dtype=torch.long, device=device) for _ in range(3))
    labels[:, P + 1 :] = IGNORED
    positions = torch.arange(P, device=device)
    if not flat:
        mask[-1, -1] = int(B == 1)
        return Batch({"input_ids": ids, "attention_mask": mask}, labels, positions, workload.label_smoothing)
    labels[:, 0] = IGNORED
    starts = torch.arange(B, device=device)[:, None] * L
    bounds = torch.arange(0, B * L + 1, L, dtype=torch.int32, device=device)
    inputs = {
        "input_ids": ids.view(1, -1),
        "position_ids": torch.arange(L, device=device).repeat(B)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": L,
        "max_length_k": L,
    }
    return Batch(inputs, labels.view(1, -1), (starts + positions).reshape(-1), workload.label_smoothing)


def true_counts(workload: Workload) -> dict[int, int]:
    """{length of a mask of scored positions: number of true elements}, which a fake tensor cannot know."""
    return {workload.tokens: workload.trained_tokens}


def autocast_dtype(method: str, workload: Workload) -> torch.dtype | None:
    """The Trainer's autocast dtype: full fine-tuning computes in 16 bits with float32 weights. None: no autocast."""
    return getattr(torch, workload.dtype) if method == "full" and workload.dtype != "float32" else None


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    enter: Enter,
    autocast: torch.dtype | None,
    loss: LossOf | None = None,
) -> None:
    """Forward, backward, clipping, optimizer. ``enter`` is called when a phase begins; ``loss`` replaces
    ``loss_of``.
    """
    enter("forward")
    value = (loss or loss_of)(model, batch, autocast)
    enter("backward")
    value.backward()
    del value
    enter("optimizer")
    if is_unit(model):
        average_gradients([parameter for parameter in model.parameters() if parameter.requires_grad])
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    # foreach where the optimizer uses it, as on a GPU.
    nn.utils.clip_grad_norm_(trained, 1.0, foreach=optimizer.defaults.get("foreach"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def loss_of(model: nn.Module, batch: Batch, autocast: torch.dtype | None, *, call: nn.Module | None = None) -> Tensor:
    """Mean cross-entropy over the scored positions, as the trainer computes it; with trl's head, its sum.

    The entropy and the accuracy that the trainer reports are computed too, because they take memory. ``call``: the
    module to call instead of ``model``, such as DDP's wrapper.
    """
    with torch.autocast(batch.labels.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        if fused_head(model) is not None:
            options = LossOptions(label_smoothing=batch.label_smoothing, want_stats=True)
            given = {"labels": batch.labels, "use_cache": False, "loss_options": options}
            return (call or model)(**batch.inputs, **given).loss
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        # The head that the trainer uses where rankwise's loss does not apply.
        if type(head) is nn.Linear and stands_on_card(batch.labels) and not batch.label_smoothing:
            decoder: Any = model.base_model
            hidden = decoder(**batch.inputs, use_cache=False).last_hidden_state
            wanted = batch.labels[:, batch.positions + 1].flatten()
            return trl_head.sum_of_losses(hidden[:, batch.positions].flatten(0, 1), head.weight, wanted)
        logits = _logits(model, batch, call or model)
    # accelerate converts the outputs of an autocast model to float32.
    return loss_from(logits if autocast is None else logits.float(), batch)


def loss_from(logits: Tensor, batch: Batch) -> Tensor:
    """The loss from the model's own logits (B, P, V)."""
    V = logits.shape[-1]
    # The trainer selects the scored logits by a mask, which copies them.
    scored = torch.arange(logits.numel() // V, device=logits.device)
    chosen = logits.reshape(-1, V)[scored].float()
    wanted = batch.labels[:, batch.positions + 1].reshape(-1)
    total = F.cross_entropy(chosen, wanted, reduction="sum", label_smoothing=batch.label_smoothing)
    _entropy_and_accuracy(chosen.detach(), wanted)
    return total / wanted.numel()


def _logits(model: nn.Module, batch: Batch, call: nn.Module) -> Tensor:
    """(B, P, V), or (B, L, V) of a model that cannot leave positions out, cut to (B, P, V)."""
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": batch.positions} if keeps else {}
    logits: Tensor = call(**batch.inputs, use_cache=False, **kept).logits
    return logits if keeps else logits[:, batch.positions]


@torch.no_grad()
def _entropy_and_accuracy(logits: Tensor, wanted: Tensor) -> None:
    log_p = F.log_softmax(logits, dim=-1)
    -(log_p.exp() * log_p).sum(-1).mean()
    (logits.argmax(-1) == wanted).float().mean()
