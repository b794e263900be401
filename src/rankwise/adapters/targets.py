"""A model's modules in the form that the rules of `rankwise.matching` read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from rankwise.adapters.base_layer import foreign_format, is_adaptable, is_linear, why_not
from rankwise.matching import Place, Places, matches
from rankwise.quantization.linear import features

# A model's modules by name, the model itself under the empty name, as ``named_modules`` gives them.
Modules = Mapping[str, nn.Module]


def places_of(modules: Modules, head: nn.Module | None) -> Places:
    """All modules but the model itself. ``head``: the output head."""
    return {name: place_of(module, is_head=module is head) for name, module in modules.items() if name}


def place_of(module: nn.Module, *, is_head: bool = False) -> Place:
    adapts = is_adaptable(module)
    outputs = features(module)[1] if adapts else 0
    reason = "" if adapts else why_not(module)
    return Place(
        type(module).__name__, is_linear(module), adapts, is_head, outputs, reason, bool(foreign_format(module))
    )


def module_names(modules: Modules, wanted: Sequence[str]) -> list[str]:
    """The modules that ``modules_to_save`` names."""
    found = [name for key in wanted for name in modules if name and matches(name, [key])]
    return list(dict.fromkeys(found))
