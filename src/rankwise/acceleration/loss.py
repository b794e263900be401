"""The language-model loss without the (tokens x vocabulary) logits, for any causal model of transformers.

The model runs with its output head replaced by one that only notes what it was given; the loss is then taken from those
hidden states, chunk by chunk, at scored positions alone. What a model does to its logits after the head (a softcap, a
scale) is read from its configuration and checked by running it once with a head that answers known numbers.

B batch, L positions, P positions that any row of the batch is scored at, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rankwise.acceleration.probe import probe
from rankwise.acceleration.recognise import is_fake
from rankwise.acceleration.replace import ATTRIBUTE, Undo, class_forward, is_free, replace_forward
from rankwise.adapters.operator import computes_in
from rankwise.ops.linear_cross_entropy import LogitShape, LossSums, chunk_rows, linear_cross_entropy

IGNORED = -100
PROBE = (-30.0, -3.0, -0.5, 0.0, 0.25, 2.0, 7.0, 40.0)
# Logits that the probing head answers: they tell identity, scale and softcap apart.


@dataclasses.dataclass(frozen=True)
class Head:
    """The output head of a model, and what happens to its logits."""

    module: nn.Module
    shape: LogitShape


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What ``model(..., loss_options=...)`` may ask of the fused loss."""

    label_smoothing: float = 0.0
    want_stats: bool = False
    # Entropy and hits are counted too.
    found: list[LossSums] = dataclasses.field(default_factory=list)
    # The sums of each call: whoever wraps ``forward`` (accelerate's autocast) may make the model's output anew.


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """Sums over the scored positions of a batch, how many there were, and the model's other outputs."""

    sums: LossSums
    count: Tensor
    outputs: Any


def find_head(model: Any) -> Head | None:
    """The head whose loss can be fused, or None where the model does not compute its logits by calling one."""
    find = getattr(model, "get_output_embeddings", None)
    module = find() if callable(find) else None
    if module is None or not is_free(module) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    shape = _configured_shape(model.config)
    return Head(module, shape) if _answers_as(model, module, shape) else None


def fused_loss(
    model: Any, head: Head, inputs: dict[str, Any], labels: Tensor, options: LossOptions | None = None
) -> FusedLoss:
    """Sum over scored positions of the cross-entropy of label i + 1 at position i; labels (B, L), -100 unscored."""
    options = options or LossOptions()
    scored = labels[:, 1:] != IGNORED
    positions = scored.any(dim=0).nonzero().squeeze(1)
    if len(positions) == 0:
        # A batch without labels still has to give a loss of zero with gradients.
        positions = torch.zeros(1, dtype=torch.long, device=labels.device)
    with _noting_hidden(head.module) as noted:
        outputs = model(**inputs, logits_to_keep=positions)
    chosen = scored[:, positions]
    hidden, targets = noted[0][chosen], labels[:, 1:][:, positions][chosen]
    sums = _sums(head, hidden, targets, options.label_smoothing, options.want_stats)
    outputs["logits"] = None
    return FusedLoss(sums, scored.sum(), outputs)


def accept_labels(model: Any, head: Head, undo: Undo) -> None:
    """Let ``model(..., labels=labels)`` use the fused loss; its output then carries no logits."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward_with_labels(self, *args, **kwargs)

    # The signature, of this model's family alone, tells the Trainer which columns the model takes.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    replace_forward(model, forward, undo)
    state = model.__dict__.setdefault(ATTRIBUTE, {})
    state["head"] = head
    undo.add(lambda: state.pop("head", None))


def _forward_with_labels(self: Any, *args: Any, loss_options: LossOptions | None = None, **kwargs: Any) -> Any:
    plain = class_forward(self)
    if kwargs.get("labels") is None or "shift_labels" in kwargs or torch.compiler.is_compiling():
        return plain(*args, **kwargs)
    bound = inspect.signature(plain).bind(*args, **kwargs)
    given = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
    if given.get("return_dict", True) is False or not _keeps_all(given.get("logits_to_keep", 0)):
        return plain(*args, **kwargs)
    labels, num_items = given.pop("labels"), given.pop("num_items_in_batch", None)
    given.pop("logits_to_keep", None)
    # Whoever asks for a loss wants no cache of keys and values, which would also hide packed rows from the mask.
    if "use_cache" in inspect.signature(plain).parameters and given.get("use_cache") is None:
        given["use_cache"] = False
    found = fused_loss(plain, self.__dict__[ATTRIBUTE]["head"], given, labels, loss_options)
    count = found.count.clamp(min=1) if num_items is None else torch.as_tensor(num_items, device=labels.device)
    loss = found.sums.loss / count
    found.outputs["loss"] = _with_router_loss(self, loss, found.outputs)
    if loss_options is not None:
        loss_options.found.append(found.sums)
    return found.outputs


def _with_router_loss(model: Any, loss: Tensor, outputs: Any) -> Tensor:
    """Mixture-of-experts models add their balancing loss where it is asked for."""
    router = getattr(outputs, "aux_loss", None)
    if router is None or not isinstance(router, Tensor):
        return loss
    return loss + getattr(model, "router_aux_loss_coef", 0.0) * router.to(loss.device)


def _keeps_all(logits_to_keep: Any) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def _sums(head: Head, hidden: Tensor, targets: Tensor, label_smoothing: float, want_stats: bool) -> LossSums:
    module: Any = head.module
    if type(module) is nn.Linear and not module.weight.requires_grad and module.weight.dtype == hidden.dtype:
        trains_bias = module.bias is not None and module.bias.requires_grad
        if not trains_bias and computes_in(hidden.dtype, hidden.device):
            return linear_cross_entropy(
                hidden,
                module.weight,
                targets,
                shape=head.shape,
                label_smoothing=label_smoothing,
                bias=module.bias,
                want_stats=want_stats,
            )
    return _sums_through(head, hidden, targets, label_smoothing)


def _sums_through(head: Head, hidden: Tensor, targets: Tensor, label_smoothing: float) -> LossSums:
    """As above through the head itself, which may be adapted, quantized or trained; chunks are computed again for the
    backward pass."""
    rows = chunk_rows(max(1, int(getattr(head.module, "out_features", 1))), 4)
    sums = []
    for piece, wanted in zip(hidden.split(rows), targets.split(rows)):
        if torch.is_grad_enabled():
            sums.append(checkpoint(_chunk, head, piece, wanted, label_smoothing, use_reentrant=False))
        else:
            sums.append(_chunk(head, piece, wanted, label_smoothing))
    loss, entropy, correct = (torch.stack(part).sum() for part in zip(*sums))
    return LossSums(loss, entropy.detach(), correct)


def _chunk(head: Head, hidden: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = head.shape(head.module(hidden)).float()
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    with torch.no_grad():
        log_p = F.log_softmax(logits, dim=-1)
        entropy = -(log_p.exp() * log_p).sum()
        correct = (logits.argmax(-1) == targets).sum()
    return loss, entropy, correct


@contextmanager
def _noting_hidden(head: nn.Module) -> Iterator[list[Tensor]]:
    """The head keeps its input and answers one meaningless logit a position."""
    noted: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        noted.append(hidden)
        return hidden.new_zeros((*hidden.shape[:-1], 1))

    head.forward = note
    try:
        yield noted
    finally:
        del head.forward


def _configured_shape(config: Any) -> LogitShape:
    """From the names that transformers' configurations use: Gemma's softcap, Granite's divisor, Cohere's factor."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitShape((getattr(config, "logit_scale", None) or 1.0) / divisor, softcap)


def _answers_as(model: Any, head: nn.Module, shape: LogitShape) -> bool:
    """Whether the model's logits are ``shape`` of what its head answers, found by letting the head answer PROBE."""
    parameter = next(model.parameters())
    called = []

    def answer(hidden: Tensor) -> Tensor:
        called.append(hidden)
        return torch.tensor(PROBE, dtype=hidden.dtype, device=hidden.device).expand(*hidden.shape[:-1], len(PROBE))

    ids = torch.zeros((1, 2), dtype=torch.long, device=parameter.device)
    head.forward = answer
    try:
        logits, why_not = probe(
            model, lambda: class_forward(model)(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        )
    finally:
        del head.forward
    if why_not is not None or logits is None:
        return False
    if len(called) != 1 or called[0].shape[1] != 1:
        return False
    if is_fake(logits):
        return logits.shape[-1] == len(PROBE)
    expected = shape(torch.tensor(PROBE, dtype=logits.dtype, device=logits.device)).expand_as(logits)
    return bool(torch.allclose(logits.float(), expected.float(), rtol=2e-2, atol=1e-3))
