"""The adapters of a model: reports of the modules that they adapt, and iterators over the wrappers in the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from rankwise.adapters.experts import AdaptedExperts, StackLora, stack_shape
from rankwise.adapters.layer import AdaptedLayer, TrainedCopy
from rankwise.adapters.parameters import experts_left_out
from rankwise.adapters.state import (
    AdapterState,
    base_modules,
    state_and_name,
    wrappers,
)
from rankwise.adapters.targets import place_of
from rankwise.adapters.token_rows import TokenRows
from rankwise.compat.torch import own_parameters
from rankwise.lora_config import LoraConfig
from rankwise.matching import LeftOut, enabled_parts, pattern_value
from rankwise.quantization.linear import count_weights, features

DEFAULT_NAME = "default"


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """One module, or one stack of experts, that an adapter changes.

    For a stack, ``name`` is the parameter's name and the features are those of one expert. ``kind``: "LoRA", "DoRA",
    "trained whole" (modules_to_save) or "new tokens" (trainable_token_indices).
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    parts: tuple[bool, ...] | None = None
    # Number of experts in a stack; None for a module.
    experts: int | None = None
    # Token ids whose rows train.
    tokens: tuple[int, ...] = ()

    @property
    def is_pair(self) -> bool:
        """Whether the module has a pair A and B."""
        return self.kind in ("LoRA", "DoRA")

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
    """The result of ``add_adapter``, ``load_adapter`` or ``hotswap_adapter``."""

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
        modules.append(AdaptedModule(path, "trained whole", *whole_features(copy.original), 0, 0))
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
    parts = enabled_parts(config, name, place_of(base))
    return AdaptedModule(name, "DoRA" if config.use_dora else "LoRA", *features(base), r, lora_alpha, parts)


def planned_tokens(name: str, base: nn.Module, ids: Iterable[int]) -> AdaptedModule:
    return AdaptedModule(name, "new tokens", *features(base), 0, 0, tokens=tuple(ids))


def planned_stack(config: LoraConfig, name: str, modules: Mapping[str, nn.Module]) -> AdaptedModule:
    path, _, leaf = name.rpartition(".")
    r = pattern_value(config.rank_pattern, name, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    stack = stack_shape(modules[path], leaf)
    return AdaptedModule(name, "LoRA", stack.in_features, stack.out_features, r, lora_alpha, experts=stack.experts)


def whole_features(module: nn.Module) -> tuple[int, int]:
    weight = getattr(module, "weight", None)
    return (weight.shape[-1], weight.shape[0]) if isinstance(weight, Tensor) else (0, 0)
