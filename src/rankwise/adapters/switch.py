"""Which adapter of a model is at work: switch, disable, merge and remove adapters, and keep one as a reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from rankwise.adapters.base_layer import is_quantized, make_foreign, make_readable, with_weight
from rankwise.adapters.experts import AdaptedExperts
from rankwise.adapters.layer import AdaptedLayer, Origin, TrainedCopy
from rankwise.adapters.lora import LowRankPair, TokenRows
from rankwise.adapters.state import (
    Wrapper,
    adapted_layers,
    adapter_state,
    base_modules,
    base_parameter,
    holder,
    inner_module,
    model_end,
    put_replaced,
    state_and_name,
    take_replaced,
    wrappers,
)
from rankwise.compat.torch import own_parameters
from rankwise.compat.transformers import tie_weights_as
from rankwise.errors import AdapterError
from rankwise.lora_config import LoraConfig
from rankwise.quantization.experts import as_the_step, stacks_in_eight_bits
from rankwise.quantization.linear import Linear4bit, in_file, is_conv1d


def set_adapter(model: nn.Module, name: str) -> None:
    """Make ``name`` the active adapter, which computes and trains; the others are frozen and have no effect.

    An adapter that was loaded with ``trainable=False`` stays frozen. Raises AdapterError: RW407 for an unknown name,
    RW408 while an adapter is merged.
    """
    state, name = state_and_name(model, name)
    take_replaced(model, state)
    state.active, state.disabled = name, False
    put_replaced(model, state)
    model.requires_grad_(False)
    trains = name not in state.inference_only
    for _, module in wrappers(model):
        module.active = name if name in module.adapters else None
        if module.active is not None:
            module.adapters[name].requires_grad_(trains)
    for key in trained_biases(model, state.configs[name], name):
        base_parameter(model, key).requires_grad_(trains)


def disable_adapter(model: nn.Module) -> None:
    """Let the model compute as its base does until ``enable_adapter``. Raises AdapterError (RW407, RW408)."""
    state, _ = state_and_name(model, None)
    take_replaced(model, state)
    state.disabled = True
    for _, module in wrappers(model):
        module.active = None


def enable_adapter(model: nn.Module) -> None:
    """Let the active adapter take effect again after ``disable_adapter``. Raises AdapterError (RW407, RW408)."""
    state, name = state_and_name(model, None)
    if not state.disabled:
        return
    state.disabled = False
    put_replaced(model, state)
    _activate(model, name)


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes as its base does. Nestable. Raises AdapterError (RW407, RW408)."""
    was_disabled = state_and_name(model, None)[0].disabled
    disable_adapter(model)
    try:
        yield
    finally:
        if not was_disabled:
            enable_adapter(model)


def remove_adapter(model: nn.Module, name: str | None = None) -> None:
    """Remove an adapter, by default the active one. Layers without any adapter become plain layers again.

    The base weights get the values that they had before the adapter was added; after PiSSA, up to rounding. If it was
    active, another adapter of the model becomes so, if there is one.

    Raises:
        AdapterError: RW407 for an unknown name, RW408 while an adapter is merged, RW424 for a PiSSA adapter over 4-bit
            layers, which hold the quantized rest of their weights only.
    """
    state, name = state_and_name(model, name)
    pissa = state.configs[name].init.kind == "pissa"
    rests = [layer for _, layer in adapted_layers(model, name) if layer.origin is not None and pissa]
    if any(is_quantized(layer.base_layer) for layer in rests):
        raise AdapterError(
            "RW424",
            f"the 4-bit base holds only the rest that pissa left of its weights, so the adapter {name!r} cannot be "
            "removed; load the model again.",
        )
    active, was_disabled = state.active, state.disabled
    disable_adapter(model)
    del state.configs[name]
    state.replaced.pop(name, None)
    state.inference_only.discard(name)
    for layer in rests:
        assert isinstance(layer.origin, Origin), "chosen so"
        layer.base_layer, layer.origin = layer.origin.restored(layer.base_layer), None
    for path, module in list(wrappers(model)):
        if name in module.adapters:
            del module.adapters[name]
        if not module.adapters:
            model.set_submodule(path, inner_module(module))
    state.active = None
    if state.configs:
        set_adapter(model, active if active in state.configs else next(iter(state.configs)))
        if was_disabled and active in state.configs:
            disable_adapter(model)
    else:
        make_foreign(model)


def trained_biases(model: nn.Module, config: LoraConfig, name: str) -> dict[str, nn.Parameter]:
    """{name in the plain model: bias} of the base's biases that train with an adapter."""
    if config.bias == "none":
        return {}
    adapted = {path for path, _ in adapted_layers(model, name)}
    found = {}
    for path, module in base_modules(model):
        bias = own_parameters(holder(module)).get("bias")
        if bias is not None and not config.trains_whole(path) and (config.bias == "all" or path in adapted):
            found[f"{path}.bias"] = bias
    return found


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
    # A merged model has its library's layers under their own names.
    make_foreign(model)
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
        model.set_submodule(path, module.train(model.get_submodule(path).training))
    if state.tied_before_merge is not None:
        tie_weights_as(model, *state.tied_before_merge)
    make_readable(model)
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


# The reference of a preference loss: the base, or the adapter at the start of training, in the same model.

REFERENCE = "reference"


def keep_reference(model: nn.Module) -> None:
    """Keep a frozen copy of the active adapter, which ``reference_at_work`` activates.

    Raises AdapterError (RW406) for an adapter that replaces parameters of the base (biases, or an embedding or head
    from its folder): the base holds one value of them.
    """
    state, name = state_and_name(model, None)
    if state.replaced.get(name):
        raise AdapterError(
            "RW406", f"the adapter {name!r} changes parameters of the base, so it cannot be the reference; train anew."
        )
    for _, module in wrappers(model):
        if name in module.adapters:
            module.adapters[REFERENCE] = copy.deepcopy(module.adapters[name]).requires_grad_(False)
    state.configs[REFERENCE] = state.configs[name]
    state.inference_only.add(REFERENCE)


@contextmanager
def reference_at_work(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes as the reference does: in evaluation mode, without dropout and NEFTune's
    noise. Trained parameters do not change. Of a model in training mode, layers whose frozen products are in 8 bits
    compute so here too, since only equal products have equal errors.
    """
    state, name = state_and_name(model, None)
    training, has_copy = model.training, REFERENCE in state.configs
    in_step = _in_eight_bits(model, name) if training and not state.disabled else []
    stacks = stacks_in_eight_bits(model) if training else {}
    used: list[LowRankPair] = []
    model.eval()
    try:
        with nullcontext() if has_copy else adapter_disabled(model), as_the_step(stacks.values()):
            if has_copy:
                _activate(model, REFERENCE)
            for layer, pair in in_step:
                layer.active = REFERENCE if has_copy else name
                at_work = layer.at_work
                assert isinstance(at_work, LowRankPair), "the pair or its copy"
                at_work.eight_bit, at_work.as_reference = pair.eight_bit, "pair" if has_copy else "base"
                used.append(at_work)
            yield
    finally:
        for pair in used:
            pair.as_reference = None
        if has_copy:
            _activate(model, name)
        model.train(training)


def _in_eight_bits(model: nn.Module, name: str) -> list[tuple[AdaptedLayer, LowRankPair]]:
    """The layers whose frozen products are in 8 bits while the adapter ``name`` trains, with its pairs."""
    found = [
        (layer, pair)
        for _, layer in adapted_layers(model, name)
        if isinstance(pair := layer.adapter(name), LowRankPair) and layer.origin is None
    ]
    return [(layer, pair) for layer, pair in found if pair.eight_bit is not None]


def _activate(model: nn.Module, name: str) -> None:
    for _, module in wrappers(model):
        module.active = name if name in module.adapters else None
