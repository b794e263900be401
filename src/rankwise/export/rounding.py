"""The effect of rounding to the model's dtype on its logits, by which the effect of a merge is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankwise.compat.torch import own_parameters
from rankwise.compat.transformers import eager_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A merge adds one rounding of each weight to those of the products, and both models round, so independent errors of
# equal size add up to less than twice one. The largest error over other tokens may be twice as large again.
ROUNDING_FACTOR = 4.0


def is_more_than_rounding(difference: float, rounding: float) -> bool:
    """Whether a difference of logits is larger than the model's rounding explains; True for NaN."""
    return not difference <= ROUNDING_FACTOR * rounding


@torch.no_grad()
def rounding_cost(model: PreTrainedModel, ids: Sequence[Tensor]) -> float:
    """Largest difference of a logit between ``model`` and the same weights computed in the next wider dtype."""
    narrow = [_logits(model, one) for one in ids]
    with _computing_wider(model), eager_experts(model.config):
        wide = [_logits(model, one) for one in ids]
    return max((a - b).abs().max().item() for a, b in zip(narrow, wide))


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.double()


@contextmanager
def _computing_wider(model: nn.Module) -> Iterator[None]:
    """A context in which each module's weights are widened for its call and then restored. The model is not copied."""
    kept: dict[nn.Module, dict[str, Tensor]] = {}

    def widen(module: nn.Module, _: object) -> None:
        kept[module] = {name: value.data for name, value in own_parameters(module).items() if value is not None}
        for name, value in kept[module].items():
            if value.is_floating_point():
                module.get_parameter(name).data = value.to(_wider(value.dtype))

    def put_back(module: nn.Module, _: object, __: object) -> None:
        for name, value in kept.pop(module).items():
            module.get_parameter(name).data = value

    owners = [module for module in model.modules() if any(p is not None for p in own_parameters(module).values())]
    hooks = [module.register_forward_pre_hook(widen) for module in owners]
    hooks += [module.register_forward_hook(put_back, always_call=True) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
