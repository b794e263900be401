"""What the head of a model computes: the language-model loss without the (tokens x vocabulary) logits, for any causal
model of transformers; and answers with labels.

The model runs with an output head that only records its input. The loss is then computed from these hidden states,
chunk by chunk, at scored positions only. A model may change its logits after the head (a softcap, a scale) and add to
the loss (a balance of experts). Both are read from its configuration, and checked by running the model with a head that
returns known numbers.

Legend: B rows, L positions, P scored positions of all rows, V vocabulary, C labels. A
position is scored where the label after it is not -100.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import ModelOutput

from rankwise.acceleration.layouts import padded
from rankwise.acceleration.parts import ATTRIBUTE, Undo, class_forward, probe, replace_forward
from rankwise.adapters.base_layer import is_own
from rankwise.compat.torch import hooks_around, is_fake
from rankwise.compat.transformers import text_config
from rankwise.constants import IGNORED, chunk_rows
from rankwise.foreign import Fields
from rankwise.labels import NUMBER, SEVERAL, SINGLE, Problem
from rankwise.ops.eight_bit import EightBit
from rankwise.ops.linear_cross_entropy import LogitShape, LossSums, linear_cross_entropy, linear_log_probs
from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.selection import computes_in, enough_chunks, is_traced
from rankwise.quantization.linear import Linear4bit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Logits that the head returns in the check; they distinguish identity, scale and softcap.
PROBE = (-30.0, -3.0, -0.5, 0.0, 0.25, 2.0, 7.0, 40.0)
PROBE_LABELS = (0, 3, IGNORED, 5, 1)
# Names under which models and configurations keep the weight of the loss that balances experts.
ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")

# The head's forward is replaced for all threads, so only one thread at a time may do so.
_one_at_a_time = RLock()


@dataclasses.dataclass
class Head:
    """The output head of a model, the change to its logits, and the terms that the model adds to the loss."""

    module: nn.Module
    shape: LogitShape
    # The model's loss function, with which the fused loss was found to agree.
    loss_function: Callable[..., Tensor] | None = None
    # Factor of the loss that balances experts; None if the losses differ with router logits.
    router_weight: float | None = 0.0
    # Where the training loss computes its logits in 8 bits. Log-probabilities, of which differences are taken, and
    # evaluations do not.
    eight_bit: EightBit | None = None


def output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def answering_head(model: nn.Module) -> Head | None:
    """The head that gives the model's logits, found with one pass over two tokens. Its loss is not checked."""
    module = output_head(model)
    if module is None or not is_own(module) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    head = Head(module, _configured_shape(model), getattr(model, "loss_function", None), _router_weight(model))
    return head if _answers_as(model, head) else None


def losing_head(model: nn.Module, head: Head) -> Head | None:
    """``head`` where the model's own loss equals the fused one, else None."""
    if not _loses_as(model, head):
        return None
    reports_routers = "output_router_logits" in inspect.signature(model.forward).parameters
    if reports_routers and not _loses_as(model, head, output_router_logits=True):
        head = dataclasses.replace(head, router_weight=None)
    return head


def fused_head(model: nn.Module) -> Head | None:
    """The current head, since adapters, merging and resizing replace the module.

    None if the fused loss no longer equals the model's, as the model has a different loss function or its head has
    a hook.
    """
    state = model.__dict__.get(ATTRIBUTE, {})
    head: Head | None = state.get("head")
    if head is not None and output_head(model) is not head.module:
        found = answering_head(model)
        state["head"] = head = None if found is None else losing_head(model, found)
    if head is None or head.loss_function != getattr(model, "loss_function", None):
        return None
    return None if any(hooks_around(head.module)) else head


def head_in_eight_bits(model: nn.Module) -> tuple[str, Head] | None:
    """(path, head) where the training loss computes its logits in 8 bits."""
    head: Head | None = model.__dict__.get(ATTRIBUTE, {}).get("head")
    if head is None or head.eight_bit is None:
        return None
    return next(name for name, module in model.named_modules() if module is head.module), head


def with_router_loss(head: Head, loss: Tensor, outputs: ModelOutput) -> Tensor:
    """``loss`` plus the balancing loss of a mixture of experts, where the model returned one."""
    router = getattr(outputs, "aux_loss", None)
    if not isinstance(router, Tensor) or not head.router_weight:
        return loss
    return loss + head.router_weight * router.to(loss.device)


def _router_weight(model: nn.Module) -> float:
    """The factor by which a mixture-of-experts model multiplies its balancing loss."""
    places = (model, getattr(model, "config", None), _text_config(model))
    found = (getattr(place, name, None) for name in ROUTER_WEIGHTS for place in places)
    return next((float(weight) for weight in found if isinstance(weight, (int, float))), 0.0)


@contextmanager
def answering(head: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """A context in which, in this thread, the head records its input and returns ``answer`` of it."""
    noted: list[Tensor] = []
    thread = get_ident()

    def note(hidden: Tensor) -> Tensor:
        if get_ident() != thread:
            return own(hidden)
        noted.append(hidden)
        return answer(hidden)

    with _one_at_a_time:
        before, own = head.__dict__.get("forward"), head.forward
        head.forward = note
        try:
            yield noted
        finally:
            if before is None:
                del head.forward
            else:
                head.forward = before


def _configured_shape(model: nn.Module) -> LogitShape:
    """The scale and softcap in a transformers configuration: Gemma's softcap, Granite's divisor, Cohere's factor."""
    config = _text_config(model)
    softcap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitShape((getattr(config, "logit_scale", None) or 1.0) / divisor, softcap)


def _text_config(model: nn.Module) -> PreTrainedConfig:
    config: Any = getattr(model, "config", None)
    return text_config(config)


def _answers_as(model: nn.Module, head: Head) -> bool:
    """Whether the model's logits are ``head.shape`` of the head's output, tested with a head that returns PROBE."""

    def answer(hidden: Tensor) -> Tensor:
        return torch.tensor(PROBE, dtype=hidden.dtype, device=hidden.device).expand(*hidden.shape[:-1], len(PROBE))

    ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    with answering(head.module, answer) as called:
        logits, why_not = probe(
            model, lambda: class_forward(model)(input_ids=ids, use_cache=False, logits_to_keep=1).logits, grad=True
        )
    if why_not is not None or logits is None:
        return False
    if len(called) != 1 or called[0].shape[1] != 1:
        return False
    if is_fake(logits):
        return logits.shape[-1] == len(PROBE)
    expected = head.shape(torch.tensor(PROBE, dtype=logits.dtype, device=logits.device)).expand_as(logits)
    return bool(torch.allclose(logits.detach().float(), expected.float(), rtol=2e-2, atol=1e-3))


def _loses_as(model: nn.Module, head: Head, **asked: bool) -> bool:
    """Whether the model's own loss scores label i + 1 at position i, plus the balance of experts.

    The head returns logits that differ at every position. On fake tensors, which have no values, the result is True.
    """
    parameter = next(model.parameters())
    if is_fake(parameter):
        return True
    labels = torch.tensor([PROBE_LABELS], device=parameter.device)
    size = getattr(head.module, "out_features", None) or _text_config(model).vocab_size
    entries = torch.arange(size * len(PROBE_LABELS), dtype=torch.float32, device=parameter.device)
    logits = (5 * torch.sin(entries)).view(1, len(PROBE_LABELS), size)
    with answering(head.module, lambda hidden: logits.to(hidden.dtype).expand(*hidden.shape[:-1], size)):
        found, why_not = probe(
            model,
            lambda: class_forward(model)(
                input_ids=torch.zeros_like(labels), labels=labels, use_cache=False, return_dict=True, **asked
            ),
        )
    loss = getattr(found, "loss", None)
    if why_not is not None or found is None or loss is None:
        return False
    shaped = head.shape(logits.to(parameter.dtype if parameter.is_floating_point() else torch.float32)).float()
    expected = F.cross_entropy(shaped[0, :-1], labels[0, 1:], ignore_index=IGNORED)
    return bool(torch.isclose(loss.float(), with_router_loss(head, expected, found).float(), rtol=1e-2, atol=1e-3))


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    # (P,) int64: the tokens after them, where the call has no labels.
    targets: Tensor | None = None
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
    forward: Callable[..., Any],
    head: Head,
    inputs: dict[str, Any],
    labels: Tensor | None,
    options: LossOptions | None = None,
) -> FusedLoss:
    """The sum over scored positions of the cross-entropy of label i + 1 at position i; labels (B, L), -100 unscored.

    ``forward``: the model's own forward. Without labels, the options have the scored positions and their targets.
    """
    options = options or LossOptions()
    scored, targets = options.scored, options.targets
    if targets is None:
        assert labels is not None, "asked by the caller"
        scored = scored_positions(labels) if scored is None else scored
        # The label behind a scored position is in the same row.
        targets = labels.flatten().index_select(0, scored + 1)
    assert scored is not None, "given with the targets"
    with answering(head.module, meaningless) as noted:
        outputs = forward(**inputs)
    # In a model on several devices, labels and hidden states may be on different ones.
    hidden = noted[0].flatten(0, 1).index_select(0, scored.to(noted[0].device))
    sums = sums_at(head, hidden, targets.to(hidden.device), options)
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
    model.__dict__.setdefault(ATTRIBUTE, {})["head"] = head


def forward_with_labels(self: nn.Module, *args: Any, loss_options: LossOptions | None = None, **kwargs: Any) -> Any:
    plain = class_forward(self)
    asks_otherwise = "shift_labels" in kwargs or "ignore_index" in kwargs
    has_targets = loss_options is not None and loss_options.targets is not None
    if (kwargs.get("labels") is None and not has_targets) or asks_otherwise or is_traced():
        return plain(*args, **kwargs)
    head, routers = fused_head(self), kwargs.get("output_router_logits")
    routers = getattr(_text_config(self), "output_router_logits", False) if routers is None else routers
    # A caller with options takes the sums, and the balancing loss from the outputs.
    if head is None or (head.router_weight is None and routers and loss_options is None):
        return plain(*args, **kwargs)
    given = _by_name(plain, args, kwargs)
    kept = given.get("logits_to_keep", 0)
    if given.get("return_dict", True) is False or isinstance(kept, Tensor) or kept != 0:
        return plain(*args, **kwargs)
    # A call for a loss needs no key-value cache, with which transformers would ignore packed rows in its mask.
    if "use_cache" in inspect.signature(plain).parameters and given.get("use_cache") is None:
        given["use_cache"] = False
    if loss_options is None and not torch.is_grad_enabled():
        return plain(**given)
    if not self.training:
        head = dataclasses.replace(head, eight_bit=None)
    labels, num_items = given.pop("labels", None), given.pop("num_items_in_batch", None)
    given.pop("logits_to_keep", None)
    found = fused_loss(plain, head, given, labels, loss_options)
    whole = found.sums.loss
    loss = whole / (max(1, found.count) if num_items is None else torch.as_tensor(num_items, device=whole.device))
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


def sums_at(head: Head, hidden: Tensor, targets: Tensor, options: LossOptions) -> LossSums:
    """The sums over the targets (P,) that follow the hidden states (P, D)."""
    module = head.module
    head = dataclasses.replace(head, shape=head.shape.at(options.temperature))
    frozen = frozen_head(module, hidden)
    if frozen is not None:
        asked: dict[str, Any] = {
            "shape": head.shape,
            "bias": module.bias,
            "want_stats": options.want_stats,
            "checked": options.scored is not None,
        }
        if options.want_log_probs:
            return linear_log_probs(hidden, frozen, targets, **asked)
        asked |= {"label_smoothing": options.label_smoothing, "eight_bit": head.eight_bit}
        return linear_cross_entropy(hidden, frozen, targets, **asked)
    return _sums_through(head, hidden, targets, options)


def frozen_head(module: Any, hidden: Tensor) -> Tensor | PackedWeight | None:
    """The weight of a head that computes as PyTorch's own in the dtype of ``hidden``, and that does not train."""
    if type(module) not in (nn.Linear, Linear4bit) or module.weight.requires_grad:
        return None
    if module.bias is not None and module.bias.requires_grad:
        return None
    weight = module.weight if type(module) is nn.Linear else module.packed
    is_near = weight.dtype == hidden.dtype and module.weight.device == hidden.device
    return weight if is_near and computes_in(hidden.dtype, hidden.device) else None


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
    return cross_entropy(logits, targets, options.label_smoothing, each=options.want_log_probs)


def cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, *, each: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """sum over P of  (1 - e) nll + e mean_V(-log p),  e the label smoothing, or with ``each`` its terms (P,); logits
    float32 (P, V), targets (P,).

    Also the sum of entropies, and the number of targets that are the most likely ones.
    """
    loss = F.cross_entropy(logits, targets, reduction="none" if each else "sum", label_smoothing=label_smoothing)
    with torch.no_grad():
        log_p = F.log_softmax(logits, dim=-1)
        entropy = -(log_p.exp() * log_p).sum()
        correct = (logits.argmax(-1) == targets).sum()
    return loss, entropy, correct


def meaningless(hidden: Tensor) -> Tensor:
    """One logit a position."""
    return hidden.new_zeros((*hidden.shape[:-1], 1))


# Answers of models with a head of labels; z logits.


@torch.no_grad()
def logits_of(
    model: Any, rows: Sequence[Fields], *, pad: int, size: int, autocast: torch.dtype | None = None
) -> Tensor:
    """The logits (n, C) of n rows, float32 on the CPU; rows of similar lengths go together, ``size`` at a time."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    found = []
    for start in range(0, len(order), size):
        inputs = padded([rows[place] for place in order[start : start + size]], {"input_ids": pad, "token_type_ids": 0})
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
