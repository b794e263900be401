"""The reference of a preference loss: the base alone, or the adapter at the start of training, in the same model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rankwise.adapters.inject import adapter_disabled
from rankwise.adapters.state import state_and_name, wrappers
from rankwise.errors import AdapterError

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
    noise. Trained parameters do not change.
    """
    state, name = state_and_name(model, None)
    training = model.training
    model.eval()
    try:
        with _frozen_copy(model, name) if REFERENCE in state.configs else adapter_disabled(model):
            yield
    finally:
        model.train(training)


@contextmanager
def _frozen_copy(model: nn.Module, name: str) -> Iterator[None]:
    """A context in which the frozen copy is active instead of the adapter ``name``."""
    _activate(model, REFERENCE)
    try:
        yield
    finally:
        _activate(model, name)


def _activate(model: nn.Module, name: str) -> None:
    for _, module in wrappers(model):
        module.active = name if name in module.adapters else None
