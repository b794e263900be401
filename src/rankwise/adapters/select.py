"""What a target matches: the modules and parameters of a model that an adapter's settings select by PEFT's rules, the
reasons why some cannot be adapted, and messages about settings that select none.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from rankwise.adapters.base_layer import foreign_format, is_adaptable, is_linear, why_not
from rankwise.compat.torch import own_parameters
from rankwise.compat.transformers import heads_of_labels, text_config
from rankwise.errors import AdapterError, some_of, warn
from rankwise.lora_config import LoraConfig
from rankwise.options import ALL_LINEAR
from rankwise.quantization.experts import first_leaf, foreign, stack_at
from rankwise.quantization.linear import features, weight_count

# {name: module} as ``named_modules`` gives them, the model itself under the empty name.
Modules = Mapping[str, nn.Module]
Value = TypeVar("Value")


def with_heads(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration that also trains the model's head of labels, whole."""
    heads = heads_of_labels(model)
    return dataclasses.replace(config, modules_to_save=(*(config.modules_to_save or ()), *heads)) if heads else config


def unread_modules(model: nn.Module, modules: Modules) -> set[str]:
    """The names of the modules outside of the language part of a multimodal model."""
    config, find = getattr(model, "config", None), getattr(model, "get_decoder", None)
    if text_config(config) is config or not callable(find):
        return set()
    read = {id(module) for module in find().modules()}
    return {name for name, module in modules.items() if id(module) not in read}


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


def experts_left_out(modules: Modules, config: LoraConfig, adapted: Collection[str]) -> LeftOut | None:
    """The stacked experts that are neither in ``adapted`` nor trained whole; None if there are none."""
    missing, distinct, endings = {}, {}, []
    for name, module, leaf in _named(modules):
        parameter = module.get_parameter(leaf)
        distinct[id(parameter)] = weight_count(module, leaf)
        # Also by the class name, since Llama 4's and JetMoE's experts lack transformers' interface.
        is_named_so = parameter.dim() == 3 and "experts" in type(module).__name__.lower()
        is_stack = is_named_so or stack_at(module, leaf) is not None
        if is_stack and name not in adapted and not config.trains_whole(name.rpartition(".")[0]):
            missing[name] = weight_count(module, leaf)
            if _obstacle(name, module, leaf, config) is None:
                endings.append(ending(name))
    if not missing:
        return None
    named = tuple(dict.fromkeys([*(config.target_parameters or ()), *endings]))
    return LeftOut(sum(missing.values()), sum(distinct.values()), named)


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


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """Whether ``wanted`` selects the module ``name``, by PEFT's rules.

    A string is a regular expression that must match all of ``name``. A list holds whole names, or ends of names that
    begin after a dot (``q_proj``).
    """
    if isinstance(wanted, str):
        return _compiled(wanted).fullmatch(name) is not None
    return not _endings(name).isdisjoint(wanted)


def _endings(name: str) -> set[str]:
    """``name``, and its ends that begin after a dot."""
    parts = name.split(".")
    return {".".join(parts[place:]) for place in range(len(parts))}


def matches_pattern(key: str, name: str) -> bool:
    """Whether the expression ``(.*\\.)?(KEY)$`` matches ``name``, as in PEFT's rank_pattern and alpha_pattern."""
    return _compiled(rf"(.*\.)?({key})$").match(name) is not None


# The library's own cache is smaller than the patterns that a configuration may have.
_compiled = functools.cache(re.compile)


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first key in ``patterns`` that matches ``name``, else ``default``."""
    return next((value for key, value in patterns.items() if matches_pattern(key, name)), default)


def suffixes(names: Iterable[str]) -> list[str]:
    """The distinct last components of dotted names, in order of appearance."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Stacked experts that are neither adapted nor trained whole."""

    parameters: int
    # Number of parameters of the whole model.
    total: int
    # The target_parameters that would adapt the experts, including those already set; empty where no adapter can.
    target_parameters: tuple[str, ...]

    def __str__(self) -> str:
        share = 100 * self.parameters / max(1, self.total)
        named = ",".join(self.target_parameters)
        way = (
            f"LoRA without dropout (methods lora, qlora) adapts them with --target-parameters {named}"
            if named
            else "their forward is not the one that adapters support"
        )
        return (
            f"{self.parameters:,} of the model's {self.total:,} parameters ({share:.1f} %) are stacked experts without "
            f"an adapter; {way}"
        )


def warn_of_experts(config: LoraConfig, found: LeftOut | None) -> None:
    """Warn (RW422) that "all-linear" does not adapt the experts of a mixture."""
    if found is not None and config.target_modules == ALL_LINEAR and not config.target_parameters:
        warn("RW422", f'target_modules "{ALL_LINEAR}" leaves the experts out: {found}.', stacklevel=3)


def ending(name: str) -> str:
    """The last three components of a stack's name: ``mlp.experts.down_proj``."""
    return ".".join(name.split(".")[-3:])


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The modules among which targets are selected."""

    modules: Modules
    # The output head, which "all-linear" leaves out.
    head: nn.Module | None
    # Modules through which text never passes, as in a vision tower. Only a whole name or a regular expression selects
    # them.
    unread: Collection[str] = ()


def target_names(config: LoraConfig, among: Candidates, model: str, *, may_be_none: bool = False) -> list[str]:
    """The names of the modules to adapt. ``model`` is the model's name in messages.

    Raises AdapterError: RW401 if nothing matches (unless ``may_be_none``), RW402 for a match that is neither a
    linear layer nor an embedding, and for a layer that cannot be adapted, such as one in another library's format.
    """
    modules = among.modules
    matched = [name for name in modules if name and _is_target(name, among, config)]
    if not matched and not may_be_none:
        raise AdapterError(
            "RW401",
            f"target_modules={config.target_modules!r:.300} selects none of the {model}'s modules that is not excluded "
            f"or trained whole; its linear layers end in {_examples(modules)}.",
        )
    takes, odd = is_adaptable, "is neither a linear layer nor an embedding"
    if config.other_kind is not None:
        takes, odd = is_linear, "takes adapters of LoRA and DoRA only"
    wrong = [name for name in matched if not takes(modules[name])]
    if not wrong:
        return matched
    first = next((name for name in wrong if why_not(modules[name])), wrong[0])
    reason = why_not(modules[first]) or odd
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    named = f"{first} ({type(modules[first]).__name__}){more}"
    raise AdapterError("RW402", f"{named} {reason}; name linear layers, such as {_examples(modules)}.")


def warn_of_unread(config: LoraConfig, among: Candidates) -> None:
    """Warn (RW177) that layers through which text never passes get no adapter."""
    read = dataclasses.replace(among, unread=())
    names = [
        name
        for name in among.unread
        if is_adaptable(among.modules[name]) and _is_target(name, read, config) and not _is_target(name, among, config)
    ]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warn(
            "RW177",
            f"no adapter on {names[0]}{more}: text does not pass there; to adapt such layers, select them by whole "
            "names or a regular expression.",
            stacklevel=3,
        )


def _is_target(name: str, among: Candidates, config: LoraConfig) -> bool:
    wanted, module = config.target_modules, among.modules[name]
    if wanted is None or (config.exclude_modules and matches(name, config.exclude_modules)):
        return False
    if config.trains_whole(name):
        return False
    is_unread = name in among.unread and module is not among.head
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        is_wanted = module is not among.head and not is_unread
        return is_wanted and (is_linear(module) or bool(foreign_format(module)))
    # As in PEFT, layers_to_transform does not restrict a whole name.
    is_list = not isinstance(wanted, str)
    if is_list and name in wanted:
        return True
    if not matches(name, wanted) or (is_list and is_unread):
        return False
    layers = _layers(config)
    return not layers or _layer_of(name, config) in layers


def _examples(modules: Modules) -> str:
    return ", ".join(suffixes(name for name, module in modules.items() if is_linear(module))[:8]) or "(none)"


def enabled_parts(config: LoraConfig, name: str, base: nn.Module) -> tuple[bool, ...] | None:
    """The parts of a fused projection to adapt; None if the whole layer adapts. Raises AdapterError (RW403)."""
    for key, parts in config.enable_lora.items():
        if not matches(name, [key]):
            continue
        outputs = features(base)[1]
        if not is_linear(base) or outputs % len(parts):
            raise AdapterError(
                "RW403",
                f"enable_lora[{key!r}] splits {name} into {len(parts)} equal parts, and it has {outputs} output "
                "rows; give as many values as the projection has parts.",
            )
        return tuple(bool(part) for part in parts)
    return None


def check_enable_lora(config: LoraConfig, names: Collection[str]) -> None:
    """Raise AdapterError (RW403) for an enable_lora key that matches no adapted module."""
    unused = [key for key in config.enable_lora if not any(matches(name, [key]) for name in names)]
    if unused:
        raise AdapterError(
            "RW403",
            f"enable_lora names {', '.join(unused)}, and no adapted module ends in that; the adapted modules end in "
            f"{', '.join(suffixes(names))}.",
        )


def check_targets(config: LoraConfig, modules: Modules) -> None:
    """Raise AdapterError (RW401) with all targets that select nothing."""
    if idle := idle_targets(config, modules):
        stacks = dict.fromkeys(ending(name) for name, module, leaf in _named(modules) if foreign(module, leaf) is None)
        experts = f"its stacked experts in {', '.join(stacks)}" if stacks else "it has no stacked experts"
        raise AdapterError("RW401", f"{'; '.join(idle)}; its linear layers end in {_examples(modules)}, {experts}.")


def warn_of_idle(idle: Sequence[str]) -> None:
    """Warn (RW420) about settings that select nothing."""
    if idle:
        warn("RW420", f"{'; '.join(idle)}; what is named here has no effect.", stacklevel=3)


def idle_targets(config: LoraConfig, modules: Modules) -> list[str]:
    """A clause for each setting of targets with entries that select nothing."""
    idle: dict[str, Sequence[object]] = {
        "target_modules": _unmatched(config.target_modules, modules),
        "target_parameters": _unmatched(config.target_parameters, [name for name, _, _ in _named(modules)]),
        "modules_to_save": [key for key in config.modules_to_save or () if not module_names(modules, [key])],
    }
    if wanted := _layers(config):
        idle["layers_to_transform"] = sorted(wanted.difference(_layer_of(name, config) for name in modules))
    return _clauses(idle)


def idle_limits(config: LoraConfig, modules: Modules, adapted: Collection[str]) -> list[str]:
    """As `idle_targets` for the other settings; ``adapted``: the modules and stacked experts to adapt."""
    idle: dict[str, Sequence[object]] = {"exclude_modules": _unmatched(config.exclude_modules, modules)}
    for setting in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, setting)
        idle[setting] = [key for key in keys if not any(matches_pattern(key, name) for name in adapted)]
    return _clauses(idle)


def _unmatched(wanted: str | Sequence[str] | None, names: Collection[str]) -> Sequence[str]:
    if isinstance(wanted, str):
        is_found = wanted.lower() == ALL_LINEAR or any(matches(name, wanted) for name in names if name)
        return [] if is_found else [wanted]
    known = set().union(*map(_endings, names))
    return [key for key in wanted or () if key not in known]


def _clauses(idle: Mapping[str, Sequence[object]]) -> list[str]:
    return [
        f"{setting} names {some_of(map(repr, entries))}, which the model does not have"
        for setting, entries in idle.items()
        if entries
    ]


def _layers(config: LoraConfig) -> set[int]:
    wanted = config.layers_to_transform
    return {wanted} if isinstance(wanted, int) else set(wanted or ())


def _layer_of(name: str, config: LoraConfig) -> int | None:
    patterns = config.layers_pattern or (r"[^.]*",)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first index in the path is the layer's; a later one may be an expert's.
        if found := _compiled(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.").match(name):
            return int(found["index"])
    return None
