"""A model's modules in the form that `rankwise.matching` takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from rankwise.adapters.base_layer import foreign_format, is_adaptable, is_linear, is_quantized, why_not
from rankwise.compat.transformers import children_read_by_weight, text_config
from rankwise.matching import NO_ENCODER, OUTSIDE_TEXT, WEIGHT_ALONE, Place, Places
from rankwise.quantization.linear import features

# {name: module} as ``named_modules`` gives them, the model itself under the empty name.
Modules = Mapping[str, nn.Module]


def places_of(modules: Modules, head: nn.Module | None, unread: Mapping[str, str]) -> Places:
    """The places of all modules except the model itself. ``head`` is the output head, ``unread`` as below."""
    return {
        name: dataclasses.replace(
            place_of(module), is_head=module is head, unread="" if module is head else unread.get(name, "")
        )
        for name, module in modules.items()
        if name
    }


def unread_modules(model: nn.Module, modules: Modules) -> dict[str, str]:
    """{module: the reason why text never passes through it}: what lies outside the language part of a multimodal model,
    cross-attention in a decoder without its encoder, and layers of which the model uses the weight alone.
    """
    text = _text_part(model)
    if text is not None:
        read = {id(module) for module in text.modules()}
        found = {name: OUTSIDE_TEXT for name, module in modules.items() if id(module) not in read}
    elif getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        found = {}
    else:
        starts = tuple(_attentions_to_an_encoder(modules))
        found = {name: NO_ENCODER for name in modules if starts and f"{name}.".startswith(starts)}
    for path, module in modules.items():
        for name in (f"{path}.{child}" for child in children_read_by_weight(module)):
            # The models call a quantized layer, whose weight they cannot multiply with.
            if name in modules and is_linear(modules[name]) and not is_quantized(modules[name]):
                found[name] = WEIGHT_ALONE
    return found


def _text_part(model: nn.Module) -> nn.Module | None:
    """The text decoder of a multimodal model; None for a model of text alone."""
    config = getattr(model, "config", None)
    if text_config(config) is config:
        return None
    find = getattr(model, "get_decoder", None)
    return find() if callable(find) else None


def _attentions_to_an_encoder(modules: Modules) -> Iterator[str]:
    """The path and a dot of each cross-attention: of the children with such a name in a layer that takes an encoder's
    output.
    """
    kinds = {type(module) for module in modules.values()}
    takes = {kind for kind in kinds if "encoder_hidden_states" in inspect.signature(kind.forward).parameters}
    for path, module in modules.items():
        if type(module) in takes:
            names = (name for name, _ in module.named_children() if "cross" in name or name == "encoder_attn")
            yield from (f"{path}.{name}." for name in names)


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
    found = [name for name in modules if name.endswith(tuple(wanted))]
    return list(dict.fromkeys(name for key in wanted for name in found if name.endswith(key)))
