"""The language-model loss without the (tokens x vocabulary) logits, for any causal model of transformers.

The model runs with an output head that only records its input. The loss is then computed from these hidden states,
chunk by chunk, at scored positions only.

Legend: B rows, L positions, P scored positions of all rows, V vocabulary. A position is scored where the label after it
is not -100.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import ModelOutput

from rankwise.acceleration.head import Head, answering, asks_for_routers, current_head, with_router_loss
from rankwise.acceleration.replace import ATTRIBUTE, Changes, Undo, class_forward, replace_forward
from rankwise.adapters.low_rank import computes_in
from rankwise.constants import IGNORED, chunk_rows
from rankwise.ops.linear_cross_entropy import LossSums, linear_cross_entropy, linear_log_probs
from rankwise.ops.selection import enough_chunks, is_traced


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The options of the fused loss in ``model(..., loss_options=...)``."""

    label_smoothing: float = 0.0
    # Also compute the entropy and the number of correct predictions.
    want_stats: bool = False
    # Also compute each label's log-probability, of logits divided by the temperature, without label smoothing.
    want_log_probs: bool = False
    temperature: float = 1.0
    # (P,) int64: `scored_positions` of labels that the caller has checked, so that no wait for the device is needed.
    scored: Tensor | None = None
    # The sums of each call.
    found: list[LossSums] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """Sums over the scored positions of a batch, their number, and the model's other outputs."""

    sums: LossSums
    count: int
    outputs: ModelOutput


def scored_positions(labels: Tensor) -> Tensor:
    """The scored positions of labels (B, L), as indices into all B L of them: (P,) int64."""
    scored = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    return scored.flatten().nonzero().squeeze(1)


def fused_loss(
    forward: Callable[..., Any], head: Head, inputs: dict[str, Any], labels: Tensor, options: LossOptions | None = None
) -> FusedLoss:
    """The sum over scored positions of the cross-entropy of label i + 1 at position i; labels (B, L), -100 unscored.

    ``forward``: the model's own forward.
    """
    options = options or LossOptions()
    scored = scored_positions(labels) if options.scored is None else options.scored
    with answering(head.module, meaningless) as noted:
        outputs = forward(**inputs)
    # In a model on several devices, labels and hidden states may be on different ones.
    hidden = noted[0].flatten(0, 1).index_select(0, scored.to(noted[0].device))
    # The label behind a scored position stands in the same row.
    targets = labels.flatten().index_select(0, scored + 1).to(hidden.device)
    sums = sums_at(head, hidden, targets, options)
    outputs["logits"] = None
    return FusedLoss(sums, len(scored), outputs)


def accept_labels(model: nn.Module, head: Head, undo: Undo) -> None:
    """Let ``model(..., labels=labels)`` use the fused loss; its output then has no logits.

    Without gradients, the output is the model's own, with logits: a Trainer computes its metrics from them.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward_with_labels(self, *args, **kwargs)

    # The Trainer reads the columns that the model accepts from its signature.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    replace_forward(model, forward, undo)
    state = model.__dict__.setdefault(ATTRIBUTE, Changes())
    state["head"] = head
    undo.add(lambda: state.pop("head", None))


def forward_with_labels(self: nn.Module, *args: Any, loss_options: LossOptions | None = None, **kwargs: Any) -> Any:
    plain = class_forward(self)
    asks_otherwise = "shift_labels" in kwargs or "ignore_index" in kwargs
    if kwargs.get("labels") is None or asks_otherwise or is_traced():
        return plain(*args, **kwargs)
    head = current_head(self)
    if head is None or (head.router_weight is None and asks_for_routers(self, kwargs)):
        return plain(*args, **kwargs)
    given = _by_name(plain, args, kwargs)
    if given.get("return_dict", True) is False or not _keeps_all(given.get("logits_to_keep", 0)):
        return plain(*args, **kwargs)
    # A call for a loss needs no key-value cache, with which transformers would ignore packed rows in its mask.
    if "use_cache" in inspect.signature(plain).parameters and given.get("use_cache") is None:
        given["use_cache"] = False
    if loss_options is None and not torch.is_grad_enabled():
        return plain(**given)
    labels, num_items = given.pop("labels"), given.pop("num_items_in_batch", None)
    given.pop("logits_to_keep", None)
    found = fused_loss(plain, head, given, labels, loss_options)
    count = max(1, found.count) if num_items is None else torch.as_tensor(num_items, device=labels.device)
    loss = found.sums.loss / (count.to(found.sums.loss.device) if isinstance(count, Tensor) else count)
    found.outputs["loss"] = with_router_loss(head, loss, found.outputs)
    if loss_options is not None:
        loss_options.found.append(found.sums)
    return found.outputs


def _by_name(function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, those of ``**kwargs`` included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    given = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def _keeps_all(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def sums_at(head: Head, hidden: Tensor, targets: Tensor, options: LossOptions) -> LossSums:
    """The sums over the targets (P,) that follow the hidden states (P, D)."""
    module = head.module
    head = dataclasses.replace(head, shape=head.shape.at(options.temperature))
    if type(module) is nn.Linear and not module.weight.requires_grad and module.weight.dtype == hidden.dtype:
        trains_bias = module.bias is not None and module.bias.requires_grad
        is_near = module.weight.device == hidden.device
        if not trains_bias and is_near and computes_in(hidden.dtype, hidden.device):
            asked: dict[str, Any] = {
                "shape": head.shape,
                "bias": module.bias,
                "want_stats": options.want_stats,
                "checked": options.scored is not None,
            }
            if options.want_log_probs:
                return linear_log_probs(hidden, module.weight, targets, **asked)
            smoothing = options.label_smoothing
            return linear_cross_entropy(hidden, module.weight, targets, label_smoothing=smoothing, **asked)
    return _sums_through(head, hidden, targets, options)


def _sums_through(head: Head, hidden: Tensor, targets: Tensor, options: LossOptions) -> LossSums:
    """The sums through the head module, which may be adapted, quantized or trained; chunks are recomputed in the
    backward pass."""
    vocabulary = max(1, int(getattr(head.module, "out_features", 1)))
    # Small chunks on a GPU too, since float32 copies take 16 bytes per logit, where a frozen head needs 2.
    rows = chunk_rows(vocabulary, 4, on_card=False)
    sums = []
    for piece, wanted in enough_chunks([*zip(hidden.split(rows), targets.split(rows))], hidden):
        if torch.is_grad_enabled():
            sums.append(checkpoint(_chunk, head, piece, wanted, options, use_reentrant=False))
        else:
            sums.append(_chunk(head, piece, wanted, options))
    losses, entropy, correct = zip(*sums)
    stats = torch.stack(entropy).sum().detach(), torch.stack(correct).sum()
    if not options.want_log_probs:
        return LossSums(torch.stack(losses).sum(), *stats)
    log_probs = -torch.cat(losses)
    return LossSums(-log_probs.sum(), *stats, log_probs)


def _chunk(head: Head, hidden: Tensor, targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    logits = head.shape(head.module(hidden)).float()
    reduction = "none" if options.want_log_probs else "sum"
    loss = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=options.label_smoothing)
    with torch.no_grad():
        log_p = F.log_softmax(logits, dim=-1)
        entropy = -(log_p.exp() * log_p).sum()
        correct = (logits.argmax(-1) == targets).sum()
    return loss, entropy, correct


def meaningless(hidden: Tensor) -> Tensor:
    """One logit a position."""
    return hidden.new_zeros((*hidden.shape[:-1], 1))
