"""Add adapters to a model and switch between them. The model keeps its class; its target layers are wrapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from rankwise.adapters.attached import (
    DEFAULT_NAME,
    AdaptedModule,
    AdapterReport,
    adapted_experts,
    adapted_layers,
    planned_module,
    planned_stack,
    report,
    trained_copies,
    whole_features,
)
from rankwise.adapters.base_layer import weight_device, weight_dtype
from rankwise.adapters.dora import Dora
from rankwise.adapters.embedding import EmbeddingLora
from rankwise.adapters.experts import AdaptedExperts, ExpertsLora, StackLora, stack_shape
from rankwise.adapters.layer import AdaptedLayer, OverBase, TrainedCopy
from rankwise.adapters.lora import Lora
from rankwise.adapters.parameters import experts_left_out, names_in, parameter_names
from rankwise.adapters.saving import SavePretrained
from rankwise.adapters.state import (
    AdapterState,
    adapter_state,
    base_modules,
    base_parameter,
    inner_module,
    put_replaced,
    replace_parameter,
    state_and_name,
    take_replaced,
    unwrapped,
    wrappers,
)
from rankwise.adapters.targets import module_names, places_of
from rankwise.compat.torch import gathered, own_parameters
from rankwise.config import LoraConfig
from rankwise.errors import AdapterError
from rankwise.matching import check_enable_lora, check_targets, target_names, warn_of_experts, warn_of_idle

Kind = TypeVar("Kind", AdaptedLayer, AdaptedExperts, TrainedCopy)
# As PEFT calls rows of a batch without an adapter.
BASE_ROW = "__base__"


def add_adapter(model: nn.Module, config: LoraConfig, *, name: str = DEFAULT_NAME) -> AdapterReport:
    """Freeze the model, add a new adapter to its target modules in place, and make it the active one.

    Args:
        model: Any PyTorch model, dense or 4-bit.
        config: Rank, scale, targets and kind of the adapter.
        name: The adapter's name among those of the model.

    Returns:
        What was adapted and what was left out; ``print`` shows it as a sentence.

    Raises:
        AdapterError: RW401 to RW404 and RW419 for targets that are not there or cannot adapt, RW405 for a name that is
            taken or cannot be one, RW406 for a second adapter that trains biases. The model is then unchanged.

    Warns of settings that match nothing (RW420), and of experts that "all-linear" leaves out (RW422).
    """
    planned = plan_adapter(model, config, name)
    return attach(model, config, planned, name)


def plan_adapter(
    model: nn.Module, config: LoraConfig, name: str = DEFAULT_NAME, *, is_foreign: bool = False
) -> list[AdaptedModule]:
    """What ``add_adapter`` would adapt; checks everything and changes nothing.

    ``is_foreign``: PEFT may have written the configuration, which takes targets that are not in the model; they are
    said (RW420) and no error.
    """
    check_name(model, config, name)
    modules = dict(base_modules(model))
    there = names_in(modules)
    if not is_foreign:
        check_targets(config, there)
    stacks = parameter_names(modules, config)
    # An empty list of target_modules leaves the stacks alone to adapt.
    stacks_suffice = bool(stacks) and (is_foreign or not config.target_modules)
    targets = target_names(
        config, places_of(modules, _output_head(model)), type(model).__name__, may_be_none=stacks_suffice
    )
    check_enable_lora(config, targets)
    warn_of_idle(config, there, [*targets, *stacks], targets=is_foreign)
    if not is_foreign:
        warn_of_experts(config, experts_left_out(modules, config, stacks))
    planned = [planned_module(config, target, modules[target]) for target in targets]
    planned += [planned_stack(config, stack, modules) for stack in stacks]
    saved = module_names(modules, config.modules_to_save or ())
    return planned + [AdaptedModule(item, "trained whole", *whole_features(modules[item]), 0, 0) for item in saved]


def attach(
    model: nn.Module, config: LoraConfig, planned: list[AdaptedModule], name: str, *, trainable: bool = True
) -> AdapterReport:
    """Carry out a plan: wrap, initialise, activate."""
    state = adapter_state(model, create=True)
    if state.active is not None:
        disable_adapter(model)
    state.configs[name] = config
    if not trainable:
        state.inference_only.add(name)
    for item in planned:
        if item.kind == "trained whole":
            _wrap(model, item.name, TrainedCopy).add(name)
        elif item.experts is not None:
            _add_stack(_wrap(model, item.path, AdaptedExperts), config, item, name)
        else:
            layer = _wrap(model, item.name, AdaptedLayer)
            # DoRA's magnitudes are norms of whole rows.
            with gathered(model, item.name) if config.use_dora else nullcontext():
                adapter = _new_adapter(config, item, layer.base_layer).train(layer.training)
            layer.adapters[name] = adapter
            layer.is_head = layer.base_layer is _output_head(model)
            if isinstance(adapter, Dora):
                adapter.is_overwritten = _overwrites_outputs(model)
    if config.adapter_dtype == "base":
        for _, module in wrappers(model):
            if isinstance(module, OverBase) and name in module.adapters:
                module.cast_with_base.add(name)
    for key, bias in _biases(model, config, name).items():
        replace_parameter(model, state, name, key, bias)
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
    set_adapter(model, name)
    return report(model, name)


def _overwrites_outputs(model: nn.Module) -> bool:
    """Whether its forward changes what a linear layer gave: Falcon's parallel block does ``mlp_output += ...``."""
    return getattr(getattr(model, "config", None), "model_type", None) == "falcon"


def set_adapter(model: nn.Module, name: str) -> None:
    """Make the adapter ``name`` the active one. It computes and trains; the others are frozen and have no effect.

    An adapter that was loaded with ``trainable=False`` stays frozen.
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
    for key in _biases(model, state.configs[name], name):
        base_parameter(model, key).requires_grad_(trains)


def disable_adapter(model: nn.Module) -> None:
    """Let the model compute as its base does until ``enable_adapter`` is called."""
    state, _ = state_and_name(model, None)
    take_replaced(model, state)
    state.disabled = True
    for _, module in wrappers(model):
        module.active = None


def enable_adapter(model: nn.Module) -> None:
    """Let the active adapter take effect again after ``disable_adapter``."""
    state, name = state_and_name(model, None)
    if not state.disabled:
        return
    state.disabled = False
    put_replaced(model, state)
    for _, module in wrappers(model):
        module.active = name if name in module.adapters else None


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes as its base does. Contexts may be nested."""
    was_disabled = state_and_name(model, None)[0].disabled
    disable_adapter(model)
    try:
        yield
    finally:
        if not was_disabled:
            enable_adapter(model)


@contextmanager
def mixed_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within this context the adapter ``names[i]`` computes row i of a batch; ``"__base__"``: the base alone.

    PEFT's ``adapter_names``, with DoRA too. In ``generate`` the rows that it repeats (beams, several answers) keep the
    adapter of their prompt. Raises AdapterError: RW407 a name that is not there, RW624 an adapter that changes more
    than layers; and in the model's forward RW625 for a batch of other rows.
    """
    state = adapter_state(model)
    for name in {*names} - {BASE_ROW}:
        state_and_name(model, name)
        if state.replaced.get(name) or any(True for _ in (*adapted_experts(model, name), *trained_copies(model, name))):
            raise AdapterError(
                "RW624",
                f"the adapter {name!r} changes more than linear layers and embeddings (biases, modules trained whole "
                "or stacked experts), which one batch cannot mix; switch between requests with set_adapter.",
            )
    layers = [module for _, module in wrappers(model) if isinstance(module, AdaptedLayer)]
    with adapter_disabled(model):
        for layer in layers:
            layer.mixed = tuple(names)
        try:
            yield
        finally:
            for layer in layers:
                layer.mixed = None


def remove_adapter(model: nn.Module, name: str | None = None) -> None:
    """Remove an adapter, by default the active one. Layers without any adapter become plain layers again.

    The base weights are as they were before the adapter was added.
    """
    state, name = state_and_name(model, name)
    disable_adapter(model)
    del state.configs[name]
    state.replaced.pop(name, None)
    state.inference_only.discard(name)
    for path, module in list(wrappers(model)):
        if name in module.adapters:
            del module.adapters[name]
        if not module.adapters:
            model.set_submodule(path, inner_module(module))
    state.active = None
    if state.configs:
        set_adapter(model, next(iter(state.configs)))


def _biases(model: nn.Module, config: LoraConfig, name: str) -> dict[str, nn.Parameter]:
    """The base's biases that train with an adapter, by the names they have in the plain model."""
    if config.bias == "none":
        return {}
    adapted = {path for path, _ in adapted_layers(model, name)}
    whole = tuple(path for path, _ in trained_copies(model, name))
    found = {}
    for path, module in base_modules(model):
        bias = own_parameters(module).get("bias")
        if bias is not None and path not in whole and (config.bias == "all" or path in adapted):
            found[f"{path}.bias"] = bias
    return found


def _output_head(model: nn.Module) -> nn.Module | None:
    """The base module that maps hidden states to logits, or None for a model without one."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return None if head is None else unwrapped(head)


def _add_stack(experts: AdaptedExperts, config: LoraConfig, item: AdaptedModule, name: str) -> None:
    if name not in experts.adapters:
        experts.adapters[name] = ExpertsLora().train(experts.training)
    stack = stack_shape(experts.base_layer, item.leaf)
    dtype = torch.float32 if config.adapter_dtype == "float32" else stack.dtype
    lora = StackLora(stack, item.r, config.scaling(item.r, item.lora_alpha), dtype=dtype)
    lora.reset_parameters(zero_b=config.init_lora_weights)
    experts.adapter(name).stacks[item.leaf] = lora


def _new_adapter(config: LoraConfig, item: AdaptedModule, base: nn.Module) -> Lora | Dora | EmbeddingLora:
    dtype = torch.float32 if config.adapter_dtype == "float32" else weight_dtype(base)
    device, scaling = weight_device(base), config.scaling(item.r, item.lora_alpha)
    adapter: Lora | Dora | EmbeddingLora
    if isinstance(base, nn.Embedding):
        adapter = EmbeddingLora(base, item.r, scaling, use_dora=config.use_dora, dtype=dtype, device=device)
    else:
        kind = Dora if config.use_dora else Lora
        adapter = kind(base, item.r, scaling, dropout=config.lora_dropout, parts=item.parts, dtype=dtype, device=device)
    adapter.reset_parameters(base, zero_b=config.init_lora_weights)
    return adapter


def _wrap(model: nn.Module, path: str, kind: type[Kind]) -> Kind:
    module = model.get_submodule(path)
    if isinstance(module, kind):
        return module
    wrapper = kind(module).train(module.training)
    model.set_submodule(path, wrapper)
    return wrapper


def check_name(model: nn.Module, config: LoraConfig, name: str) -> None:
    state = getattr(model, "rankwise_adapters", AdapterState())
    configs = state.configs
    if state.merged is not None:
        raise AdapterError("RW408", "an adapter is merged into the weights; call unmerge_adapter(model) first.")
    if not name or "." in name:
        raise AdapterError("RW405", f"{name!r} cannot name an adapter; use a name without dots.")
    if name in configs:
        remedy = f"give another name, or remove that one with rankwise.remove_adapter(model, {name!r})"
        raise AdapterError("RW405", f"the model already has an adapter {name!r}; {remedy}.")
    if configs and any(other.bias != "none" for other in [*configs.values(), config]):
        raise AdapterError(
            "RW406",
            'adapters that train biases change the base itself and stand alone; use bias="none" for several.',
        )
