"""Put adapters into a model and switch between them; its class stays what it was, its target layers are wrapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import features, weight_device, weight_dtype
from rankwise.adapters.dora import Dora
from rankwise.adapters.embedding import EmbeddingLora
from rankwise.adapters.layer import AdaptedLayer, Adapter, TrainedCopy
from rankwise.adapters.lora import Lora
from rankwise.adapters.targets import (
    check_enable_lora,
    enabled_parts,
    module_names,
    pattern_value,
    target_names,
)
from rankwise.config import LoraConfig
from rankwise.errors import AdapterError
from rankwise.quantization.linear import weight_count

DEFAULT_NAME = "default"


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """One module that an adapter changes. ``kind``: LoRA or DoRA, or "trained whole" (modules_to_save)."""

    name: str
    kind: str
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    parts: tuple[bool, ...] | None = None


@dataclasses.dataclass(frozen=True)
class AdapterReport:
    """What ``add_adapter`` or ``load_adapter`` did to the model."""

    name: str
    modules: tuple[AdaptedModule, ...]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        kinds = ", ".join(sorted({module.kind for module in self.modules}))
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        return (
            f"{len(self.modules)} modules adapted ({kinds}); {self.trainable_parameters:,} of "
            f"{self.total_parameters:,} parameters train ({share:.2f} %)"
        )


@dataclasses.dataclass
class AdapterState:
    """What a model knows about its adapters; lives on the model as ``rankwise_adapters``."""

    configs: dict[str, LoraConfig] = dataclasses.field(default_factory=dict)
    active: str | None = None
    # None while adapters are disabled.
    frozen_biases: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    # The base's own values of the biases that train, by parameter name.
    trained_biases: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    # The trained values, kept here while adapters are disabled.
    merged: list[tuple[str, AdaptedLayer | TrainedCopy]] | None = None
    # The wrapped modules that a reversible merge took out, by name.


def add_adapter(model: nn.Module, config: LoraConfig, *, name: str = DEFAULT_NAME) -> AdapterReport:
    """Freeze the model and lay a new adapter over its target modules, in place; it becomes the active one.

    Raises AdapterError: RW401-RW404 for targets, RW405 for a name that is taken or cannot be one, RW406 for a
    second adapter that trains biases. Nothing changes when it raises.
    """
    planned = plan_adapter(model, config, name)
    return attach(model, config, planned, name)


def plan_adapter(model: nn.Module, config: LoraConfig, name: str = DEFAULT_NAME) -> list[AdaptedModule]:
    """What ``add_adapter`` would adapt; checks everything and changes nothing."""
    _check_name(model, config, name)
    modules = dict(base_modules(model))
    names = target_names(modules, _output_head(model), config)
    check_enable_lora(config, names)
    planned = [_planned(config, target, modules[target]) for target in names]
    saved = module_names(modules, config.modules_to_save or ())
    return planned + [AdaptedModule(item, "trained whole", *_whole(modules[item]), 0, 0) for item in saved]


def attach(model: nn.Module, config: LoraConfig, planned: list[AdaptedModule], name: str) -> AdapterReport:
    """Carry out a plan: wrap, initialise, activate."""
    adapter_state(model, create=True).configs[name] = config
    for item in planned:
        if item.kind == "trained whole":
            _wrap(model, item.name, TrainedCopy).add(name)
        else:
            layer = _wrap(model, item.name, AdaptedLayer)
            layer.adapters[name] = _new_adapter(config, item, layer.base_layer)
    if any(isinstance(module, TrainedCopy) for module in model.modules()):
        untie_head(model)
    set_adapter(model, name)
    return report(model, name)


def report(model: nn.Module, name: str | None = None) -> AdapterReport:
    """The modules of an adapter (the active one by default) and the model's parameter counts."""
    state, name = state_and_name(model, name)
    config, modules = state.configs[name], []
    for path, layer in adapted_layers(model, name):
        modules.append(_planned(config, path, layer.base_layer))
    for path, copy in trained_copies(model, name):
        modules.append(AdaptedModule(path, "trained whole", *_whole(copy.original), 0, 0))
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return AdapterReport(name, tuple(modules), trainable, sum(map(weight_count, parameters)))


def has_adapter(model: nn.Module) -> bool:
    return bool(getattr(model, "rankwise_adapters", AdapterState()).configs)


def adapter_config(model: nn.Module, name: str | None = None) -> LoraConfig:
    """The configuration of an adapter, the active one by default."""
    state, name = state_and_name(model, name)
    return state.configs[name]


def set_adapter(model: nn.Module, name: str) -> None:
    """Make ``name`` the active adapter: it computes and trains, the others are frozen and out of the way."""
    state, name = state_and_name(model, name)
    _restore_biases(model, state)
    state.active = name
    model.requires_grad_(False)
    for _, module in wrappers(model):
        module.active = name if name in module.adapters else None
        if module.active is not None:
            module.adapters[name].requires_grad_(True)
    _train_biases(model, state, name)


def disable_adapter(model: nn.Module) -> None:
    """Let the model compute as its base does, until ``enable_adapter``."""
    state, _ = state_and_name(model, None)
    for _, module in wrappers(model):
        module.active = None
    _swap_biases(model, state.trained_biases, state.frozen_biases)


def enable_adapter(model: nn.Module) -> None:
    """Undo ``disable_adapter``."""
    state, name = state_and_name(model, None)
    for _, module in wrappers(model):
        module.active = name if name in module.adapters else None
    _restore_biases(model, state)


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes as its base does."""
    disable_adapter(model)
    try:
        yield
    finally:
        enable_adapter(model)


def remove_adapter(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter out; layers that no adapter needs any more are plain again."""
    state, name = state_and_name(model, name)
    disable_adapter(model)
    del state.configs[name]
    for path, module in list(wrappers(model)):
        if name in module.adapters:
            del module.adapters[name]
        if not module.adapters:
            model.set_submodule(path, inner_module(module))
    state.frozen_biases, state.trained_biases = {}, {}
    state.active = None
    if state.configs:
        set_adapter(model, next(iter(state.configs)))


def adapted_layers(model: nn.Module, name: str) -> Iterator[tuple[str, AdaptedLayer]]:
    """(path, layer) of every layer that the adapter ``name`` lies over."""
    for path, module in wrappers(model):
        if isinstance(module, AdaptedLayer) and name in module.adapters:
            yield path, module


def trained_copies(model: nn.Module, name: str) -> Iterator[tuple[str, TrainedCopy]]:
    """(path, module) of every module that the adapter ``name`` trains whole."""
    for path, module in wrappers(model):
        if isinstance(module, TrainedCopy) and name in module.adapters:
            yield path, module


def trainable_biases(model: nn.Module, config: LoraConfig, name: str) -> dict[str, nn.Parameter]:
    """The base's biases that train with an adapter, by parameter name."""
    if config.bias == "none":
        return {}
    layers = {f"{path}.base_layer.bias" for path, _ in adapted_layers(model, name)}
    return {
        key: parameter
        for key, parameter in model.named_parameters()
        if (key in layers or (config.bias == "all" and key.endswith(".bias"))) and ".adapters." not in key
    }


def inner_module(wrapper: AdaptedLayer | TrainedCopy) -> nn.Module:
    return wrapper.base_layer if isinstance(wrapper, AdaptedLayer) else wrapper.original


def untie_head(model: nn.Module) -> None:
    """Say on the model that its head and its embedding are no longer one tensor, so that saving writes both."""
    config: Any = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}  # type: ignore[assignment]


def wrappers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer | TrainedCopy]]:
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer | TrainedCopy):
            yield path, module


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules as they were before any wrapping, under the names they had."""
    hidden: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in hidden):
            continue
        if isinstance(module, AdaptedLayer | TrainedCopy):
            hidden.append(f"{path}.")
            yield path, inner_module(module)
        else:
            yield path, module


def _output_head(model: nn.Module) -> nn.Module | None:
    """The base module that maps hidden states to logits, or None for a model without one."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return inner_module(head) if isinstance(head, AdaptedLayer | TrainedCopy) else head


def _planned(config: LoraConfig, name: str, base: nn.Module) -> AdaptedModule:
    r = pattern_value(config.rank_pattern, name, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    parts = enabled_parts(config, name, base)
    return AdaptedModule(name, "DoRA" if config.use_dora else "LoRA", *features(base), r, lora_alpha, parts)


def _whole(module: nn.Module) -> tuple[int, int]:
    weight = getattr(module, "weight", None)
    return (weight.shape[-1], weight.shape[0]) if isinstance(weight, Tensor) else (0, 0)


def _new_adapter(config: LoraConfig, item: AdaptedModule, base: nn.Module) -> Adapter:
    dtype = torch.float32 if config.adapter_dtype == "float32" else weight_dtype(base)
    where: dict[str, Any] = {"dtype": dtype, "device": weight_device(base)}
    scaling, zero_b = config.scaling(item.r, item.lora_alpha), config.init_lora_weights
    if isinstance(base, nn.Embedding):
        embedding = EmbeddingLora(base, item.r, scaling, use_dora=config.use_dora, **where)
        embedding.reset_parameters(base, zero_b=zero_b)
        return embedding
    where |= {"dropout": config.lora_dropout, "parts": item.parts}
    if config.use_dora:
        dora = Dora(base, item.r, scaling, **where)
        dora.reset_parameters(base, zero_b=zero_b)
        return dora
    lora = Lora(base, item.r, scaling, **where)
    lora.reset_parameters(zero_b=zero_b)
    return lora


def _wrap(model: nn.Module, path: str, kind: type[Any]) -> Any:
    module = model.get_submodule(path)
    if not isinstance(module, kind):
        module = kind(module).train(module.training)
        model.set_submodule(path, module)
    return module


def adapter_state(model: nn.Module, *, create: bool = False) -> AdapterState:
    state = getattr(model, "rankwise_adapters", None)
    if state is None and create:
        state = model.rankwise_adapters = AdapterState()  # type: ignore[assignment]
    if not isinstance(state, AdapterState):
        raise AdapterError("RW407", f"this {type(model).__name__} has no adapter; add or load one first.")
    return state


def state_and_name(model: nn.Module, name: str | None) -> tuple[AdapterState, str]:
    state = adapter_state(model)
    name = name or state.active
    if name not in state.configs:
        known = ", ".join(state.configs) or "none"
        raise AdapterError("RW407", f"the model has no adapter {name!r}; it has {known}.")
    return state, name


def _check_name(model: nn.Module, config: LoraConfig, name: str) -> None:
    configs = getattr(model, "rankwise_adapters", AdapterState()).configs
    if not name or "." in name:
        raise AdapterError("RW405", f"{name!r} cannot name an adapter; use a name without dots.")
    if name in configs:
        raise AdapterError("RW405", f"the model already has an adapter {name!r}; give another name or remove that one.")
    if configs and any(other.bias != "none" for other in [*configs.values(), config]):
        raise AdapterError(
            "RW406",
            'adapters that train biases change the base itself and stand alone; use bias="none" for several.',
        )


def _train_biases(model: nn.Module, state: AdapterState, name: str) -> None:
    for key, parameter in trainable_biases(model, state.configs[name], name).items():
        parameter.requires_grad_(True)
        state.frozen_biases.setdefault(key, parameter.detach().clone())


def _restore_biases(model: nn.Module, state: AdapterState) -> None:
    if state.trained_biases:
        _swap_biases(model, {}, state.trained_biases)
        state.trained_biases = {}


@torch.no_grad()
def _swap_biases(model: nn.Module, keep: dict[str, Tensor], put: dict[str, Tensor]) -> None:
    for key, value in put.items():
        parameter = model.get_parameter(key)
        keep.setdefault(key, parameter.detach().clone())
        parameter.copy_(value)
