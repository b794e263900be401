"""The state of a model's adapters: the modules that they adapt, the wrappers in the model, and the parameters of the
base that an adapter replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import ForeignLinear
from rankwise.adapters.experts import AdaptedExperts, StackLora, stack_shape
from rankwise.adapters.layer import AdaptedLayer, TrainedCopy
from rankwise.adapters.lora import TokenRows
from rankwise.adapters.select import LeftOut, enabled_parts, experts_left_out, pattern_value
from rankwise.compat.torch import own_parameters
from rankwise.errors import AdapterError
from rankwise.lora_config import LoraConfig
from rankwise.methods import METHODS
from rankwise.quantization.linear import count_weights, features

Wrapper = AdaptedLayer | AdaptedExperts | TrainedCopy


@dataclasses.dataclass(kw_only=True)
class AdapterState:
    """The state of a model's adapters, stored on the model as ``rankwise_adapters``."""

    configs: dict[str, LoraConfig] = dataclasses.field(default_factory=dict)
    # The adapter that computes and trains, unless ``disabled``.
    active: str | None = None
    disabled: bool = False
    # Names of adapters loaded with trainable=False, which stay frozen when they become active.
    inference_only: set[str] = dataclasses.field(default_factory=set)
    # The base's values of parameters that an adapter replaces: biases, or an embedding or head from its folder.
    base_values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    # {adapter: its values of those parameters}; up to date only while the adapter is not active.
    replaced: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    # (path, wrapper) of the modules that a reversible merge replaced.
    merged: list[tuple[str, Wrapper]] | None = None
    # config.tie_word_embeddings and all_tied_weights_keys before a merge that untied head and embedding.
    tied_before_merge: tuple[bool, dict[str, str]] | None = None


def adapter_state(model: nn.Module, *, create: bool = False) -> AdapterState:
    state = getattr(model, "rankwise_adapters", None)
    if state is None and create:
        state = model.rankwise_adapters = AdapterState()  # type: ignore[assignment]
    if not isinstance(state, AdapterState):
        raise AdapterError("RW407", f"this {type(model).__name__} has no adapter; add or load one first.")
    return state


def state_and_name(model: nn.Module, name: str | None, *, merged: bool = False) -> tuple[AdapterState, str]:
    """The state, and ``name`` or the active adapter's name. Raises AdapterError: RW407 for an unknown name; RW408
    while an adapter is merged, unless ``merged``.
    """
    state = adapter_state(model)
    name = name or state.active
    if name not in state.configs:
        known = ", ".join(state.configs) or "none"
        raise AdapterError("RW407", f"the model has no adapter {name!r}; it has {known}.")
    if state.merged is not None and not merged:
        raise AdapterError(
            "RW408", f"the adapter {state.active!r} is merged into the weights; call unmerge_adapter(model) first."
        )
    return state, name


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    for path, module in model.named_modules():
        if isinstance(module, Wrapper):
            yield path, module


def inner_module(wrapper: Wrapper) -> nn.Module:
    return wrapper.original if isinstance(wrapper, TrainedCopy) else wrapper.base_layer


def unwrapped(module: nn.Module) -> nn.Module:
    return inner_module(module) if isinstance(module, Wrapper) else module


def model_end(model: nn.Module, which: Literal["input", "output"]) -> nn.Module | None:
    """The base's input embedding or output head, unwrapped; None for a model without one."""
    find = getattr(model, f"get_{which}_embeddings", None)
    found = find() if callable(find) else None
    return None if found is None else unwrapped(found)


def tied_head(model: nn.Module) -> str | None:
    """The path of the output head that shares the embedding's weight; None if there is none."""
    head, embedding = model_end(model, "output"), model_end(model, "input")
    weight = getattr(embedding, "weight", None)
    if head is embedding or weight is None or getattr(head, "weight", None) is not weight:
        return None
    return next(path for path, module in base_modules(model) if module is head)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules as they were before any wrapping, under the names they had."""
    # named_modules is depth-first: the modules inside a wrapper follow it.
    inside = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        if isinstance(module, Wrapper | ForeignLinear):
            inside = f"{path}."
        yield path, unwrapped(module)
        if isinstance(module, TrainedCopy):
            yield from ((f"{path}.{name}", part) for name, part in base_modules(module.original) if name)


def holder(module: nn.Module) -> nn.Module:
    """The module that holds the base's parameters: within a `ForeignLinear`, the other library's layer."""
    module = unwrapped(module)
    return module.layer if isinstance(module, ForeignLinear) else module


def base_parameter(model: nn.Module, key: str) -> nn.Parameter:
    """A parameter of the base by the name it had before any wrapping."""
    path, _, leaf = key.rpartition(".")
    return holder(model.get_submodule(path)).get_parameter(leaf)


@torch.no_grad()
def replace_parameter(model: nn.Module, state: AdapterState, name: str, key: str, value: Tensor) -> None:
    """Let the adapter ``name``, which must not be active, replace a parameter of the base while it is active."""
    parameter = base_parameter(model, key)
    state.base_values.setdefault(key, parameter.detach().clone())
    state.replaced.setdefault(name, {})[key] = value.detach().clone().to(parameter)


@torch.no_grad()
def put_replaced(model: nn.Module, state: AdapterState) -> None:
    """Copy the active adapter's values of replaced parameters into the base."""
    for key, value in state.replaced.get(state.active or "", {}).items():
        base_parameter(model, key).copy_(value)


@torch.no_grad()
def take_replaced(model: nn.Module, state: AdapterState) -> None:
    """Store the active adapter's values of replaced parameters and restore those of the base."""
    if state.disabled:
        return
    for key, value in state.replaced.get(state.active or "", {}).items():
        parameter = base_parameter(model, key)
        value.copy_(parameter)
        parameter.copy_(state.base_values[key])


DEFAULT_NAME = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedModule:
    """One module, or one stack of experts, that an adapter changes.

    For a stack, ``name`` is the parameter's name and the features are those of one expert. ``kind``: "LoRA",
    "DoRA" or another's words, "trained whole" (modules_to_save) or "new tokens" (trainable_token_indices).
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    # 0 where no pair trains.
    r: int = 0
    lora_alpha: float = 0
    parts: tuple[bool, ...] | None = None
    # Number of experts in a stack; None for a module.
    experts: int | None = None
    # Token ids whose rows train.
    tokens: tuple[int, ...] = ()

    @property
    def is_pair(self) -> bool:
        """Whether the module has a pair A and B."""
        return self.kind not in ("trained whole", "new tokens")

    @property
    def path(self) -> str:
        """The path of the module; for a stack, that of its experts."""
        return self.name if self.experts is None else self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The stack's name in its experts module."""
        return self.name.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class AdapterReport:
    """The result of ``add_adapter`` or ``load_adapter``."""

    name: str
    modules: tuple[AdaptedModule, ...]
    trainable_parameters: int
    total_parameters: int
    # Stacked experts of a mixture that are neither adapted nor trained whole.
    left_out: LeftOut | None = None

    def __str__(self) -> str:
        kinds = ", ".join(sorted({module.kind for module in self.modules}))
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        return (
            f"{len(self.modules)} modules adapted ({kinds}); {self.trainable_parameters:,} of "
            f"{self.total_parameters:,} parameters train ({share:.2f} %)"
        ) + (f"; {self.left_out}" if self.left_out else "")


def report(model: nn.Module, name: str | None = None) -> AdapterReport:
    """The modules that an adapter (by default the active one) changes, and the model's parameter counts."""
    state, name = state_and_name(model, name)
    config, modules = state.configs[name], []
    for path, layer in adapted_layers(model, name):
        adapter = layer.adapter(name)
        if not isinstance(adapter, TokenRows):
            modules.append(planned_module(config, path, layer.base_layer))
        elif not adapter.is_tied:
            modules.append(planned_tokens(path, layer.base_layer, adapter.ids.tolist()))
    for path, experts in adapted_experts(model, name):
        leaves = (f"{path}.{leaf}" for leaf in stacks_of(experts, name))
        modules += [planned_stack(config, stack, {path: experts.base_layer}) for stack in leaves]
    for path, copy in trained_copies(model, name):
        modules.append(planned_whole(path, copy.original))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    missing = experts_left_out(dict(base_modules(model)), config, [item.name for item in modules])
    return AdapterReport(name, tuple(modules), trainable, count_weights(model), missing)


def has_adapter(model: nn.Module) -> bool:
    return bool(getattr(model, "rankwise_adapters", AdapterState()).configs)


def adapter_config(model: nn.Module, name: str | None = None) -> LoraConfig:
    """The configuration of an adapter, by default the active one. Raises AdapterError (RW407) for an unknown name."""
    state, name = state_and_name(model, name, merged=True)
    return state.configs[name]


def adapted_layers(model: nn.Module, name: str) -> Iterator[tuple[str, AdaptedLayer]]:
    """(path, layer) of every layer with the adapter ``name``."""
    for path, module in wrappers(model):
        if isinstance(module, AdaptedLayer) and name in module.adapters:
            yield path, module


def adapted_experts(model: nn.Module, name: str) -> Iterator[tuple[str, AdaptedExperts]]:
    """(path, experts) of every experts module with the adapter ``name``."""
    for path, module in wrappers(model):
        if isinstance(module, AdaptedExperts) and name in module.adapters:
            yield path, module


def stacks_of(experts: AdaptedExperts, name: str) -> dict[str, StackLora]:
    """{stack: low-rank pairs of its experts} of an adapter, in the order of the module's parameters."""
    adapter = experts.adapter(name)
    found = ((leaf, adapter.of(leaf)) for leaf in own_parameters(experts.base_layer))
    return {leaf: lora for leaf, lora in found if lora is not None}


def trained_copies(model: nn.Module, name: str) -> Iterator[tuple[str, TrainedCopy]]:
    """(path, module) of every module that the adapter ``name`` trains whole."""
    for path, module in wrappers(model):
        if isinstance(module, TrainedCopy) and name in module.adapters:
            yield path, module


def planned_module(config: LoraConfig, name: str, base: nn.Module) -> AdaptedModule:
    r = pattern_value(config.rank_pattern, name, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    parts = enabled_parts(config, name, base)
    kind, (K, N) = METHODS[config.kind].words, features(base)
    return AdaptedModule(name=name, kind=kind, in_features=K, out_features=N, r=r, lora_alpha=lora_alpha, parts=parts)


def planned_tokens(name: str, base: nn.Module, ids: Iterable[int]) -> AdaptedModule:
    K, N = features(base)
    return AdaptedModule(name=name, kind="new tokens", in_features=K, out_features=N, tokens=tuple(ids))


def planned_whole(name: str, module: nn.Module) -> AdaptedModule:
    weight = getattr(module, "weight", None)
    N, K = (weight.shape[0], weight.shape[-1]) if isinstance(weight, Tensor) else (0, 0)
    return AdaptedModule(name=name, kind="trained whole", in_features=K, out_features=N)


def planned_stack(config: LoraConfig, name: str, modules: Mapping[str, nn.Module]) -> AdaptedModule:
    path, _, leaf = name.rpartition(".")
    r = pattern_value(config.rank_pattern, name, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    stack = stack_shape(modules[path], leaf)
    return AdaptedModule(
        name=name,
        kind="LoRA",
        in_features=stack.in_features,
        out_features=stack.out_features,
        r=r,
        lora_alpha=lora_alpha,
        experts=stack.experts,
    )
