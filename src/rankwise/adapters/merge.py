"""Merge an adapter into plain layers, and undo it."""

from __future__ import annotations

import torch
from torch import nn

from rankwise.adapters.base_layer import with_weight
from rankwise.adapters.experts import AdaptedExperts
from rankwise.adapters.inject import disable_adapter, enable_adapter
from rankwise.adapters.layer import AdaptedLayer, TrainedCopy
from rankwise.adapters.lora import LowRankPair, TokenRows
from rankwise.adapters.state import Wrapper, adapter_state, inner_module, model_end, state_and_name, wrappers
from rankwise.compat.transformers import tie_weights_as
from rankwise.errors import AdapterError
from rankwise.quantization.linear import Linear4bit, in_file, is_conv1d


@torch.no_grad()
def merge_adapter(model: nn.Module, *, reversible: bool = True) -> None:
    """Replace the wrapped layers by plain layers whose weights include the active adapter's update.

    A 4-bit layer becomes dense, in the dtype in which it computes, and so does each adapted stack of 4-bit experts;
    with ``for_merge="nf4"``, a layer becomes 4-bit, and with q4_0 dense with the values of that format. A
    disabled adapter is enabled first. The model's other adapters are gone too, until ``unmerge_adapter``.

    Args:
        model: A model with an active adapter.
        reversible: Keep the wrapped layers with the base's original weights for ``unmerge_adapter``, which then
            restores every weight bit for bit. False frees their memory and drops all adapters.

    Raises:
        AdapterError: RW407 if there is no adapter, RW408 if one is merged already. The model is then unchanged.
    """
    state, _ = state_and_name(model, None)
    was_disabled = state.disabled
    enable_adapter(model)
    wrapped = list(wrappers(model))
    try:
        # All before the first is replaced, so that a merge that fails leaves the model as it was.
        merged = [_merged(module) for _, module in wrapped]
    except BaseException:
        if was_disabled:
            disable_adapter(model)
        raise
    # The output head or the embedding gets a weight of its own if it is merged.
    ends = model_end(model, "output"), model_end(model, "input")
    touches_ends = any(inner_module(module) is end for _, module in wrapped if module.active for end in ends)
    changes_tied = touches_ends and not _has_tied_rows(wrapped)
    for (path, _), plain in zip(wrapped, merged, strict=True):
        model.set_submodule(path, plain)
    if _has_tied_rows(wrapped):
        # Head and embedding got the same rows, so they stay tied.
        head, embedding = (getattr(model, f"get_{end}_embeddings")() for end in ("output", "input"))
        head.weight = embedding.weight
    if changes_tied:
        state.tied_before_merge = _untie_head(model)
    state.merged = wrapped
    if not reversible:
        del model.rankwise_adapters


def unmerge_adapter(model: nn.Module) -> None:
    """Undo ``merge_adapter``: every weight and adapter is restored, bit for bit.

    Raises:
        AdapterError: RW408 if nothing is merged, RW407 if the merge was not reversible.
    """
    state = adapter_state(model)
    if state.merged is None:
        raise AdapterError("RW408", "no adapter is merged; call merge_adapter(model) with reversible=True first.")
    for path, module in state.merged:
        model.set_submodule(path, module)
    if state.tied_before_merge is not None:
        tie_weights_as(model, *state.tied_before_merge)
    state.merged = state.tied_before_merge = None


def _merged(module: Wrapper) -> nn.Module:
    if module.active is None:
        return inner_module(module)
    if isinstance(module, TrainedCopy):
        return module.chosen()
    if isinstance(module, AdaptedExperts):
        return module.adapter(module.active).merge(module.base_layer)
    base, adapter = module.base_layer, module.adapter(module.active)
    if isinstance(adapter, LowRankPair) and adapter.for_merge == "nf4":
        layer = Linear4bit.of(adapter.rounded(base), getattr(base, "bias", None))
        layer.was_conv1d = is_conv1d(base) or getattr(base, "was_conv1d", False)
        return layer.train(base.training)
    return with_weight(base, in_file(adapter.merge(base)))


def _has_tied_rows(wrapped: list[tuple[str, Wrapper]]) -> bool:
    adapters = (
        module.adapter(module.active) for _, module in wrapped if isinstance(module, AdaptedLayer) and module.active
    )
    return any(isinstance(adapter, TokenRows) and adapter.is_tied for adapter in adapters)


def _untie_head(model: nn.Module) -> tuple[bool, dict[str, str]] | None:
    """Record on the model that head and embedding are no longer tied, so that saving writes both.

    Returns the former values of config.tie_word_embeddings and all_tied_weights_keys.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return None
    return tie_weights_as(model, False, {})
