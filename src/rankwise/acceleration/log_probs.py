"""Log-probabilities of given tokens without the (tokens x vocabulary) logits, for training on preferences and rewards.

``model(..., labels=labels, fused_lm_head=True)`` runs the model with an output head that only records its input,
without padding where attention permits. Then it computes chunks of logits, at scored positions only.

Legend: B rows, L positions, T positions without padding, P scored positions of all rows, V vocabulary. A position is
scored where the label after it is not -100.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from rankwise.acceleration import attention
from rankwise.acceleration.attention import close, has_window
from rankwise.acceleration.loss import (
    LossOptions,
    answering,
    forward_with_labels,
    fused_head,
    meaningless,
    scored_positions,
    sums_at,
)
from rankwise.acceleration.replace import ATTRIBUTE, class_forward, probe
from rankwise.compat.transformers import attention_of
from rankwise.constants import IGNORED

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
