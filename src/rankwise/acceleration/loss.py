"""What the head of a model computes: the language-model loss, and log-probabilities of given tokens, both without the
(tokens x vocabulary) logits, for any causal model of transformers; and answers with labels.

The model runs with an output head that only records its input. The loss is then computed from these hidden states,
chunk by chunk, at scored positions only. A model may change its logits after the head (a softcap, a scale) and add to
the loss (a balance of experts). Both are read from its configuration, and checked by running the model with a head that
returns known numbers.

Legend: B rows, L positions, T positions without padding, P scored positions of all rows, V vocabulary, C labels. A
position is scored where the label after it is not -100.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from rankwise.acceleration import attention
from rankwise.acceleration.attention import close, has_window
from rankwise.acceleration.parts import ATTRIBUTE, Undo, class_forward, probe, replace_forward
from rankwise.adapters.base_layer import is_own
from rankwise.adapters.low_rank import computes_in
from rankwise.compat.torch import hooks_around, is_fake
from rankwise.compat.transformers import attention_of, text_config
from rankwise.constants import IGNORED, chunk_rows
from rankwise.foreign import Fields
from rankwise.labels import NUMBER, SEVERAL, SINGLE, Problem
from rankwise.ops.linear_cross_entropy import LogitShape, LossSums, linear_cross_entropy, linear_log_probs
from rankwise.ops.selection import enough_chunks, is_traced

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Logits that the head returns in the check; they distinguish identity, scale and softcap.
PROBE = (-30.0, -3.0, -0.5, 0.0, 0.25, 2.0, 7.0, 40.0)
PROBE_LABELS = (0, 3, IGNORED, 5, 1)
# Names under which models and configurations keep the weight of the loss that balances experts.
ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")

# The head's forward is replaced for all threads, so only one thread at a time may do so.
_one_at_a_time = RLock()


@dataclasses.dataclass(frozen=True)
class Head:
    """The output head of a model, the change to its logits, and the terms that the model adds to the loss."""

    module: nn.Module
    shape: LogitShape
    # The model's loss function, with which the fused loss was found to agree.
    loss_function: Callable[..., Tensor] | None = None
    # Factor of the loss that balances experts; None if the losses differ with router logits.
    router_weight: float | None = 0.0


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
    # The label behind a scored position is in the same row.
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
    model.__dict__.setdefault(ATTRIBUTE, {})["head"] = head


def forward_with_labels(self: nn.Module, *args: Any, loss_options: LossOptions | None = None, **kwargs: Any) -> Any:
    plain = class_forward(self)
    asks_otherwise = "shift_labels" in kwargs or "ignore_index" in kwargs
    if kwargs.get("labels") is None or asks_otherwise or is_traced():
        return plain(*args, **kwargs)
    head, routers = fused_head(self), kwargs.get("output_router_logits")
    routers = getattr(_text_config(self), "output_router_logits", False) if routers is None else routers
    if head is None or (head.router_weight is None and routers):
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


# Log-probabilities of given tokens, for training on preferences and rewards. ``model(..., labels=labels,
# fused_lm_head=True)`` runs the model without padding where attention permits.

Inputs = Mapping[str, Tensor | int]


# How rows are laid out: padded; end to end, without padding; or end to end with the common prefix of rows i and
# i + B / 2, the prompt of a pair of answers, once.
Layout = Literal["padded", "flat", "pairs"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """How a model computes a call with ``fused_lm_head=True``."""

    layout: Layout = "padded"
    # Why pairs that may share their prompts do not.
    apart: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """The scores of each label except the first, (B, L - 1); 0 where the label is -100."""

    log_probs: Tensor
    # The mean entropy over all scored tokens, repeated at each of them; without gradient.
    entropy: Tensor | None
    aux_loss: Tensor | None


def accept_scores(model: PreTrainedModel, layout: Layout) -> bool:
    """Let ``model(..., labels=labels, fused_lm_head=True)`` of an accelerated model return TokenScores.

    Returns whether the output head can be computed separately. ``restore`` undoes this with all other changes.
    """
    if fused_head(model) is None:
        return False

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return _scored(self, **kwargs) if fused_lm_head else forward_with_labels(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    apart = _sharing_obstacle(model) if layout == "pairs" else None
    model.__dict__[ATTRIBUTE]["asked"] = Asked(layout) if apart is None else Asked("flat", apart)
    return True


def asked_of(model: nn.Module) -> Asked:
    """The ``Asked`` with which the model currently computes such calls."""
    asked: Asked = model.__dict__[ATTRIBUTE]["asked"]
    return asked


def _sharing_obstacle(model: PreTrainedModel) -> str | None:
    """Why the answers of a pair cannot be arranged around their prompt, or None; tested where no layer has a window."""
    text = model.config.get_text_config()
    if attention_of(model.config) != attention.NAME or next(model.parameters()).device.type != "cpu":
        return "the attention in use takes no ranges of keys"
    if has_window(text):
        return "some layers have a window"
    if hasattr(text, "output_router_logits"):
        return "the balancing loss of its experts counts the tokens of both rows"
    ids = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 3, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    labels = ids.masked_fill((torch.arange(5) < 3) | (mask == 0), IGNORED)

    def scores() -> list[Tensor]:
        found = []
        for layout in ("padded", "pairs"):
            model.__dict__[ATTRIBUTE]["asked"] = Asked(layout)
            found.append(_scored(model, labels, ids, mask, want_stats=False).log_probs)
        return found

    found, why_not = probe(model, scores)
    if found is None:
        return f"the model could not be run with ranges of keys ({why_not})"
    return None if close(*found) else "they get other log-probabilities than separately"


def _scored(
    model: PreTrainedModel,
    labels: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    temperature: float = 1.0,
    want_stats: bool = True,
    **more: Any,
) -> TokenScores:
    """Scores of logits divided by the temperature; ``want_stats`` adds the entropy."""
    head = fused_head(model)
    assert head is not None, "a hook was put on the output head"
    scored = scored_positions(labels)
    inputs, places = _laid_out(asked_of(model).layout, input_ids, attention_mask, scored)
    with answering(head.module, meaningless) as noted:
        outputs = class_forward(model)(**inputs, **{**more, "use_cache": False})
    # In a model on several devices, labels and hidden states may be on different ones.
    hidden = noted[0].flatten(0, 1).index_select(0, places.to(noted[0].device))
    targets = labels.flatten().index_select(0, scored + 1).to(hidden.device)
    options = LossOptions(want_stats=want_stats, want_log_probs=True, temperature=temperature, scored=scored)
    found = sums_at(head, hidden, targets, options)
    assert found.log_probs is not None, "asked for"
    return _token_scores(labels, scored, found.log_probs, found.entropy if want_stats else None, outputs)


def scores_of_logits(
    model: PreTrainedModel,
    layout: Layout,
    labels: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    temperature: float,
    want_stats: bool,
    **more: Any,
) -> TokenScores:
    """TokenScores from whole logits, for a model without acceleration, or whose logits are not just its head's."""
    scored = scored_positions(labels)
    inputs, places = _laid_out(layout, input_ids, attention_mask, scored)
    outputs = model(**inputs, **{**more, "use_cache": False})
    log_p = F.log_softmax(outputs.logits.flatten(0, 1).index_select(0, places).float() / temperature, -1)
    targets = labels.flatten().index_select(0, scored + 1)
    log_probs = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).detach().sum() if want_stats else None
    return _token_scores(labels, scored, log_probs, entropy, outputs)


def _token_scores(
    labels: Tensor, scored: Tensor, log_probs: Tensor, entropy: Tensor | None, outputs: ModelOutput
) -> TokenScores:
    """Log-probabilities (P,) at the places of their labels; ``entropy`` is the sum over them."""

    def spread(values: Tensor) -> Tensor:
        whole = values.new_zeros(labels.numel()).index_copy(0, scored.to(values.device), values)
        return whole.view(labels.shape)[:, :-1]

    mean = None
    if entropy is not None:
        mean = spread((entropy / max(1, len(scored))).to(log_probs.dtype).expand(len(scored)))
    return TokenScores(spread(log_probs), mean, getattr(outputs, "aux_loss", None))


def _laid_out(layout: Layout, input_ids: Tensor, attention_mask: Tensor, scored: Tensor) -> tuple[Inputs, Tensor]:
    """Rows (B, L) with padding at both ends as inputs of a model, and the places of the scored positions (P,) there.

    Positions count from a row's first token, as in generation.
    """
    if layout == "pairs":
        return _pairs(input_ids, attention_mask, scored)
    if layout == "flat":
        return _end_to_end(input_ids, attention_mask, scored)
    length = input_ids.shape[1]
    # argmax gives the first of equal ones.
    first, longest = attention_mask.argmax(1), int(attention_mask.sum(1).max())
    columns = (torch.arange(length, device=input_ids.device) + first[:, None]) % length
    rows = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs = {name: tensor.gather(1, columns)[:, :longest] for name, tensor in rows.items()}
    row = scored // length
    return inputs, row * longest + scored % length - first[row]


def _end_to_end(input_ids: Tensor, attention_mask: Tensor, scored: Tensor) -> tuple[Inputs, Tensor]:
    """All rows without padding as one row (1, T), positions from 0 in each; and the indices of scored positions."""
    kept = attention_mask.flatten().nonzero().squeeze(1)
    positions = (attention_mask.cumsum(1) - 1).flatten()
    lengths = attention_mask.sum(1)
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    inputs: Inputs = {
        "input_ids": input_ids.flatten()[kept][None],
        "position_ids": positions[kept][None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return inputs, (attention_mask.flatten().cumsum(0) - 1)[scored]


def _pairs(input_ids: Tensor, attention_mask: Tensor, scored: Tensor) -> tuple[Inputs, Tensor]:
    """As `_end_to_end`, with each pair's prompt once: the first answer reversed, the prompt, the second answer.

    So each token sees one range of keys: a token of the first answer from itself to the end of the prompt, any other
    from the beginning of the prompt to itself. Rows (B, L) are right-padded; the first half are the first answers.
    """
    (B, L), device = input_ids.shape, input_ids.device
    first_scored = torch.full((B,), L, device=device).scatter_reduce(0, scored // L, scored % L, "amin")
    lengths = attention_mask.sum(1).tolist()
    differs = input_ids[: B // 2] != input_ids[B // 2 :]
    alike = torch.where(differs.any(1), differs.byte().argmax(1), L)
    # The last token of the prompt is scored too, since it predicts the first token of each answer.
    shared = torch.minimum(alike, first_scored.view(2, -1).amin(0) + 1).tolist()
    taken, slots = [], torch.zeros(B, L, dtype=torch.long)
    starts, ends, begin = [], [], 0
    for row, prompt in enumerate(shared):
        first, second = lengths[row] - prompt, lengths[row + B // 2] - prompt
        middle, end = begin + first, begin + first + prompt
        backwards = torch.arange(prompt + first - 1, prompt - 1, -1)
        forwards = torch.arange(prompt + second)
        taken += [row * L + backwards, (row + B // 2) * L + forwards]
        slots[row, prompt : prompt + first] = torch.arange(middle - 1, begin - 1, -1)
        slots[row, :prompt] = torch.arange(middle, end)
        slots[row + B // 2, : prompt + second] = torch.arange(middle, end + second)
        own = torch.arange(begin, end + second)
        starts.append(torch.where(own < middle, own, middle))
        ends.append(torch.where(own < middle, end, own + 1))
        begin = end + second
    order = torch.cat(taken)
    seen = attention.KeyRanges(torch.cat(starts).int()[None], torch.cat(ends).int()[None])
    inputs = {
        "input_ids": input_ids.flatten()[order][None],
        "position_ids": (order % L)[None],
        "attention_mask": attention.as_mask(seen),
    }
    return inputs, slots.flatten()[scored]


# Answers of models with a head of labels; z logits.

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
