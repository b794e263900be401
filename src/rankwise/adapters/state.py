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
    """The state of a model's adapters, kept on the model as ``rankwise_adapters``."""

    configs: dict[str, LoraConfig] = dataclasses.field(default_factory=dict)
    # The adapter that computes and trains, unless ``disabled``.
    active: str | None = None
    disabled: bool = False
    # Adapters loaded with trainable=False: they stay frozen when they become active.
    inference_only: set[str] = dataclasses.field(default_factory=set)
    # The base's own values of parameters that some adapter replaces (biases, an embedding that came along).
    base_values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    # Per adapter its values of those parameters, current while it is not at work.
    replaced: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    # The wrapped modules that a reversible merge took out, by name.
    merged: list[tuple[str, Wrapper]] | None = None
    # What a merge that unties head and embedding changed: config.tie_word_embeddings and all_tied_weights_keys.
    tied_before_merge: tuple[bool, dict[str, str]] | None = None


def adapter_state(model: nn.Module, *, create: bool = False) -> AdapterState:
    state = getattr(model, "rankwise_adapters", None)
    if state is None and create:
        state = model.rankwise_adapters = AdapterState()  # type: ignore[assignment]
    if not isinstance(state, AdapterState):
        raise AdapterError("RW407", f"this {type(model).__name__} has no adapter; add or load one first.")
    return state


def state_and_name(model: nn.Module, name: str | None, *, merged: bool = False) -> tuple[AdapterState, str]:
    """The state and an adapter's name, the active one's by default. Raises RW407, and RW408 while merged."""
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
    """The base's embedding, or its module that maps hidden states to logits; None for a model without one."""
    find = getattr(model, f"get_{which}_embeddings", None)
    found = find() if callable(find) else None
    return None if found is None else unwrapped(found)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules as they were before any wrapping, under the names they had."""
    # named_modules goes depth-first: what stands in a wrapper follows it.
    inside = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        if isinstance(module, Wrapper | ForeignLinear):
            inside = f"{path}."
        yield path, unwrapped(module)


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
    """Put the values of the newly active adapter into the base."""
    for key, value in state.replaced.get(state.active or "", {}).items():
        base_parameter(model, key).copy_(value)


@torch.no_grad()
def take_replaced(model: nn.Module, state: AdapterState) -> None:
    """Set the values of the adapter aside and restore the base's own."""
    if state.disabled:
        return
    for key, value in state.replaced.get(state.active or "", {}).items():
        parameter = base_parameter(model, key)
        value.copy_(parameter)
        parameter.copy_(state.base_values[key])
