"""Replace layers of a loaded model: one by another, or all 4-bit weights by their dense values."""

from __future__ import annotations

import torch
from torch import nn

from rankwise.compat.torch import share_hooks
from rankwise.quantization.config import dtype_named
from rankwise.quantization.experts import dequantize_stack, four_bit_stacks
from rankwise.quantization.linear import Linear4bit


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the layer ``name`` by ``layer``, which gets the old one's hooks."""
    share_hooks(layer, model.get_submodule(name))
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | str | None = None) -> int:
    """Replace every `Linear4bit` of ``model`` and every 4-bit stack of experts by its dense values W', in place.
    Returns their number.

    ``dtype``: that of the new weights, or its name; None keeps each weight's own. Raises QuantizationError (RW605) for
    an unknown dtype.
    """
    wanted = dtype_named(dtype, "dtype")
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Linear4bit):
            places.setdefault(id(module), []).append(name)
    # A list of names holds no reference to the layers, so that each is freed once it is replaced.
    for names in places.values():
        layer = model.get_submodule(names[0])
        assert isinstance(layer, Linear4bit), "found by its class"
        dense = layer.dense_layer(None if wanted is None else layer.dequantize().to(wanted))
        for name in names:
            replace_layer(model, name, dense)
        del layer
    stacks = [stack for _, stack in four_bit_stacks(model)]
    for stack in stacks:
        dequantize_stack(stack, wanted)
    return len(places) + len(stacks)
