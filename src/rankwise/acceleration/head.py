"""The output head of a causal model, and whether a loss from the head's input equals the model's own loss.

A model may change its logits after the head (a softcap, a scale) and add to the loss (a balance of experts). Both are
read from its configuration, and checked by running the model with a head that returns known numbers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.acceleration.replace import ATTRIBUTE, class_forward, probe
from rankwise.adapters.base_layer import is_own
from rankwise.compat.torch import hooks_around, is_fake
from rankwise.compat.transformers import text_config
from rankwise.constants import IGNORED
from rankwise.ops.linear_cross_entropy import LogitShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.utils.generic import ModelOutput

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
    # Factor of the loss that balances experts; None where the losses differ with router logits.
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


def current_head(model: nn.Module) -> Head | None:
    """The current head, since adapters, merging and resizing replace the module.

    None where the fused loss no longer equals the model's, as the model has a different loss function or its head has
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


def asks_for_routers(model: nn.Module, given: Mapping[str, object]) -> bool:
    asked = given.get("output_router_logits")
    return bool(getattr(_text_config(model), "output_router_logits", False) if asked is None else asked)


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
