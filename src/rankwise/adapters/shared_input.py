"""Layers that read the same input (q, k and v; gate and up) computed together when the first of them is called.

The first call computes every member's output with one pass over the input for all their A, and the others fetch theirs:
the modules between stay as they are, and no model has to be known. An input is "the same" when it is the same tensor
object, not written to in between, under the same gradient mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.operator import branch_of, drawn_dropout
from rankwise.ops.low_rank_linear import low_rank_linear

PATIENCE = 4
# Outputs left unfetched more often than fetched by so much: these layers do not read the same input after all.


class SharedInput:
    """A group of adapted layers. Anything that one of them cannot do together they do apart."""

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        # Weak: a copied or removed layer must not keep its former siblings alive.
        self._layers = [weakref.ref(layer) for layer in layers]
        self._waiting: dict[int, Tensor] = {}
        self._input: Any = None
        self._missed = 0

    def output(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        """What ``layer`` makes of x, or None where it has to be computed apart."""
        if self._is_same_input(x) and id(layer) in self._waiting:
            y = self._waiting.pop(id(layer))
            self._missed = max(0, self._missed - 1)
            return y
        if self._waiting:
            self._missed += len(self._waiting)
            self._waiting = {}
        if self._missed > PATIENCE:
            return None
        return self._compute(layer, x)

    def _compute(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        layers = [member for member in (ref() for ref in self._layers) if member is not None]
        if layer not in layers or not _compatible(layers):
            return None
        branches = []
        for member in layers:
            assert member.active is not None, "compatible layers are adapted"
            branch = branch_of(member.adapters[member.active], member.base_layer, x)
            if branch is None:
                return None
            branches.append(branch)
        adapter: Any = layer.adapters[layer.active]  # type: ignore[index]
        ys = low_rank_linear(x, branches, drawn_dropout(adapter.dropout, adapter.training))
        self._waiting = {id(member): y for member, y in zip(layers, ys)}
        self._input = (weakref.ref(x), _version(x), torch.is_grad_enabled())
        return self._waiting.pop(id(layer))

    def _is_same_input(self, x: Tensor) -> bool:
        if self._input is None:
            return False
        before, version, grad = self._input
        return before() is x and version == _version(x) and grad == torch.is_grad_enabled()


def _compatible(layers: Sequence[AdaptedLayer]) -> bool:
    """Whether all are adapted as a whole, with one dropout, in one mode."""
    if not all(layer.is_ready for layer in layers):
        return False
    adapters: list[Any] = [layer.adapters[layer.active] for layer in layers]  # type: ignore[index]
    first = adapters[0]
    return all(
        hasattr(adapter, "low_rank")
        and (adapter.dropout, adapter.training) == (first.dropout, first.training)
        and adapter.lora_A.dtype == first.lora_A.dtype
        for adapter in adapters
    )


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
