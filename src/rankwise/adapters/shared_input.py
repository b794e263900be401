"""Compute layers that read the same input (q, k and v; gate and up) together, when the first of them is called.

The first call computes the outputs of all layers in the group, with one pass over the input for all their A; the other
layers fetch their outputs when they are called. So this needs no change of the model's code. Two inputs are the same
when they are one tensor object, not written to in between, under the same gradient mode.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from rankwise.adapters.dora import Dora
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.lora import Lora
from rankwise.adapters.operator import branch_of, drawn_dropout
from rankwise.compat.torch import writes_to
from rankwise.errors import AdapterError
from rankwise.ops.low_rank_linear import low_rank_linear

# Layers stop sharing when unfetched outputs exceed fetched ones by this number. It is decided between optimizer steps
# only, so that gradient checkpointing recomputes the same graph.
PATIENCE = 4


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs that the other layers of a group have not fetched yet, for one input."""

    x: weakref.ref[Tensor]
    version: int
    grad: bool
    # {id of the layer: its output}.
    waiting: dict[int, Tensor]

    def are_of(self, x: Tensor) -> bool:
        return self.x() is x and self.version == writes_to(x) and self.grad == torch.is_grad_enabled()


class SharedInput:
    """A group of adapted layers. Where they cannot be computed together, each computes alone."""

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        # Weak, since a copied or removed layer must not keep the other layers alive.
        self._layers = [weakref.ref(layer) for layer in layers]
        self._kept: Outputs | None = None
        self._missed = 0
        self._apart = False
        # Version counter of the first layer's A at the last decision whether the layers compute apart.
        self._judged = -1

    def __deepcopy__(self, memo: dict[int, object]) -> SharedInput:
        # Copied layers are not in the group, and compute alone.
        return self

    def __reduce__(self) -> NoReturn:
        refuse_pickling()

    def output(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        """The output of ``layer`` for x, or None where the layer has to compute it alone."""
        # Read once, since another thread may replace self._kept; it does not add to these outputs.
        kept = self._kept
        if kept is not None and kept.are_of(x):
            y = kept.waiting.pop(id(layer), None)
            if y is not None:
                self._missed = max(0, self._missed - 1)
                return y
        if kept is not None:
            self._missed += len(kept.waiting)
            self._kept = None
        if self._are_apart():
            return None
        return self._compute(layer, x)

    def _are_apart(self) -> bool:
        # The first layer's A decides for all: every layer asks in each step, and their version counters may differ.
        first = self._layers[0]()
        adapter = None if first is None else first.at_work
        version = self._judged if adapter is None else writes_to(adapter.lora_A)
        if version != self._judged:
            self._apart, self._judged = self._missed > PATIENCE, version
        return self._apart

    def _compute(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        layers = [member for member in (ref() for ref in self._layers) if member is not None]
        adapters = _compatible(layers) if layer in layers else None
        if adapters is None:
            return None
        branches = []
        for adapter, member in zip(adapters, layers, strict=True):
            branch = branch_of(adapter, member.base_layer, x)
            if branch is None:
                return None
            branches.append(branch)
        ys = low_rank_linear(x, branches, drawn_dropout(adapters[0].dropout, adapters[0].training))
        waiting = {id(member): y for member, y in zip(layers, ys)}
        y = waiting.pop(id(layer))
        self._kept = Outputs(weakref.ref(x), writes_to(x), torch.is_grad_enabled(), waiting)
        return y


def refuse_pickling() -> NoReturn:
    """Raise AdapterError (RW418) where a model with shared inputs is pickled."""
    raise AdapterError(
        "RW418",
        "a model that optimize_for_training or accelerate_peft has changed cannot be pickled; call "
        "rankwise.acceleration.restore(model) first, or save with save_adapter or save_pretrained.",
    )


def _compatible(layers: Sequence[AdaptedLayer]) -> list[Lora | Dora] | None:
    """The active adapters of the layers if all have the same dropout, mode and dtype; else None."""
    if not all(layer.is_ready for layer in layers):
        return None
    adapters = [adapter for layer in layers if isinstance(adapter := layer.at_work, Lora | Dora)]
    kinds = {(adapter.dropout, adapter.training, adapter.lora_A.dtype) for adapter in adapters}
    return adapters if len(adapters) == len(layers) and len(kinds) == 1 else None
