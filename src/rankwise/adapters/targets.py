"""A model's modules in the form that `rankwise.matching` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from rankwise.adapters.base_layer import foreign_format, is_adaptable, is_linear, why_not
from rankwise.compat.transformers import text_config
from rankwise.matching import Place, Places, matches
from rankwise.quantization.linear import features

# {name: module} as ``named_modules`` gives them, the model itself under the empty name.
Modules = Mapping[str, nn.Module]


def places_of(modules: Modules, head: nn.Module | None, text: nn.Module | None = None) -> Places:
    """The places of all modules except the model itself.

    ``head`` is the output head, ``text`` the language part of a multimodal model (None for a model of text alone).
    """
    read = {id(module) for module in (() if text is None else text.modules())}
    return {
        name: dataclasses.replace(
            place_of(module),
            is_head=module is head,
            is_unread=bool(read) and id(module) not in read and module is not head,
        )
        for name, module in modules.items()
        if name
    }


def text_part(model: nn.Module) -> nn.Module | None:
    """The text decoder of a multimodal model; None for a model of text alone."""
    config = getattr(model, "config", None)
    if text_config(config) is config:
        return None
    find = getattr(model, "get_decoder", None)
    return find() if callable(find) else None


def place_of(module: nn.Module) -> Place:
    """The place of a module of which nothing but itself is known."""
    adapts = is_adaptable(module)
    return Place(
        type(module).__name__,
        is_linear(module),
        adapts,
        outputs=features(module)[1] if adapts else 0,
        why_not="" if adapts else why_not(module),
        is_foreign=bool(foreign_format(module)),
    )


def module_names(modules: Modules, wanted: Sequence[str]) -> list[str]:
    """The names of the modules that ``modules_to_save`` selects."""
    found = [name for key in wanted for name in modules if name and matches(name, [key])]
    return list(dict.fromkeys(found))
