"""The state of a model's adapters, and the parameters of the base that an adapter replaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from rankwise.adapters.experts import AdaptedExperts
from rankwise.adapters.foreign_layer import ForeignLinear
from rankwise.adapters.layer import AdaptedLayer, TrainedCopy
from rankwise.errors import AdapterError
from rankwise.lora_config import LoraConfig

Wrapper = AdaptedLayer | AdaptedExperts | TrainedCopy


@dataclasses.dataclass
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
    """The path of the output head that shares the embedding's weight; None where there is none."""
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


def base_parameter(model: nn.Module, key: str) -> nn.Parameter:
    """A parameter of the base by the name it had before any wrapping."""
    path, _, leaf = key.rpartition(".")
    return unwrapped(model.get_submodule(path)).get_parameter(leaf)


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
