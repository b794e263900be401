"""What in a model an adapter's settings select: its modules and parameters, in the form that `rankwise.matching` takes,
and the reasons why some cannot be adapted.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from rankwise.adapters.base_layer import foreign_format, is_adaptable, is_linear, is_quantized, why_not
from rankwise.compat.torch import own_parameters
from rankwise.compat.transformers import children_read_by_weight, text_config
from rankwise.errors import AdapterError
from rankwise.lora_config import LoraConfig
from rankwise.matching import NO_ENCODER, OUTSIDE_TEXT, WEIGHT_ALONE, LeftOut, Names, Place, Places, left_out, matches
from rankwise.quantization.experts import first_leaf, foreign, stack_at
from rankwise.quantization.linear import features, weight_count

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


def parameter_names(modules: Modules, config: LoraConfig) -> list[str]:
    """The names of the stacked experts to adapt, in the model's order.

    Raises AdapterError (RW419) for parameters that are not stacked experts, that train whole, or whose module has a
    forward that adapters do not support.
    """
    wanted = config.target_parameters or ()
    found = [item for item in _named(modules) if matches(item[0], wanted)] if wanted else []
    reasons = {item[0]: reason for item in found if (reason := _obstacle(*item, config)) is not None}
    if reasons:
        name, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise AdapterError(
            "RW419",
            f"target_parameters matches {name}{more}, which cannot be adapted: {reason}; leave it out, or merge an "
            "adapter that PEFT trained so in PEFT.",
        )
    return [name for name, _, _ in found]


def names_in(modules: Modules) -> Names:
    """The names in a model that an adapter's settings can select."""
    parameters = list(_named(modules))
    return Names(
        modules=[name for name in modules if name],
        adaptable=[name for name, module in modules.items() if name and is_adaptable(module)],
        parameters=[name for name, _, _ in parameters],
        stacks=[name for name, module, leaf in parameters if foreign(module, leaf) is None],
    )


def experts_left_out(modules: Modules, config: LoraConfig, adapted: Collection[str]) -> LeftOut | None:
    """The stacked experts that are neither in ``adapted`` nor trained whole; None where there are none."""
    stacks, distinct, reachable = {}, {}, []
    for name, module, leaf in _named(modules):
        parameter = module.get_parameter(leaf)
        distinct[id(parameter)] = weight_count(parameter)
        # Also by the class name, since Llama 4's and JetMoE's experts lack transformers' interface.
        is_named_so = parameter.dim() == 3 and "experts" in type(module).__name__.lower()
        if is_named_so or stack_at(module, leaf) is not None:
            stacks[name] = weight_count(parameter)
            if _obstacle(name, module, leaf, config) is None:
                reachable.append(name)
    return left_out(config, stacks, reachable, adapted, sum(distinct.values()))


def _named(modules: Modules) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, name in the module) of every parameter."""
    for path, module in modules.items():
        for leaf, parameter in own_parameters(module).items():
            if parameter is not None:
                yield f"{path}.{leaf}" if path else leaf, module, leaf


def _obstacle(name: str, module: nn.Module, leaf: str, config: LoraConfig) -> str | None:
    parameter = module.get_parameter(leaf)
    if stack_at(module, leaf) is None and parameter.dim() != 3:
        kind = f"a weight of shape {tuple(parameter.shape)} of a {type(module).__name__}"
        return f"it is {kind}, and rankwise adapts linear layers (target_modules) and stacked experts"
    if (reason := foreign(module, leaf)) is not None:
        return reason
    if leaf not in (first_leaf(module), "down_proj"):
        return f"{type(module).__name__} does not use it in a matrix product"
    if config.trains_whole(path := name.rpartition(".")[0]):
        return f"modules_to_save trains {path} whole"
    return None
