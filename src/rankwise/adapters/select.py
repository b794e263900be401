"""What a target matches: the modules and parameters of a model that an adapter's settings select by PEFT's rules, the
reasons why some cannot be adapted, and messages about settings that select none.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from rankwise.adapters.base_layer import foreign_format, is_adaptable, is_linear, why_not
from rankwise.compat.torch import own_parameters
from rankwise.compat.transformers import heads_of_labels, text_config
from rankwise.errors import AdapterError, warn
from rankwise.lora_config import LoraConfig, is_plain
from rankwise.options import ALL_LINEAR
from rankwise.quantization.experts import first_leaf, foreign, stack_at
from rankwise.quantization.linear import features, weight_count

# {name: module} as ``named_modules`` gives them, the model itself under the empty name.
Modules = Mapping[str, nn.Module]
Value = TypeVar("Value")
NO_EFFECT = "RW420"
# Names in a list that is searched name by name, and names in a message.
FEW, MOST_NAMED = 16, 10


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
    """The stacked experts that are neither in ``adapted`` nor trained whole; None if there are none."""
    missing, distinct, endings = {}, {}, []
    for name, module, leaf in _named(modules):
        parameter = module.get_parameter(leaf)
        distinct[id(parameter)] = weight_count(parameter)
        # Also by the class name, since Llama 4's and JetMoE's experts lack transformers' interface.
        is_named_so = parameter.dim() == 3 and "experts" in type(module).__name__.lower()
        is_stack = is_named_so or stack_at(module, leaf) is not None
        if is_stack and name not in adapted and not config.trains_whole(name.rpartition(".")[0]):
            missing[name] = weight_count(parameter)
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
    if len(wanted) < FEW:
        return any(name == key or name.endswith(f".{key}") for key in wanted)
    return not _set_of(tuple(wanted)).isdisjoint(_endings(name))


@functools.lru_cache(maxsize=8)
def _set_of(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


def _endings(name: str) -> list[str]:
    """``name``, and its ends that begin after a dot."""
    parts = name.split(".")
    return [".".join(parts[place:]) for place in range(len(parts))]


def matches_pattern(key: str, name: str) -> bool:
    """Whether the expression ``(.*\\.)?(KEY)$`` matches ``name``, as in PEFT's rank_pattern and alpha_pattern."""
    if is_plain(key):
        # A configuration may give every module a key of its own. A dot matches any character.
        end = name[-len(key) :]
        is_whole = len(end) == len(name) or name[-len(key) - 1] == "."
        return is_whole and len(end) == len(key) and all(a in (b, ".") for a, b in zip(key, end))
    return _compiled(rf"(.*\.)?({key})$").match(name) is not None


# The library's own cache is smaller than the patterns that a configuration may have.
_compiled = functools.lru_cache(maxsize=1000)(re.compile)


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first key in ``patterns`` that matches ``name``, else ``default``."""
    return next((value for key, value in patterns.items() if matches_pattern(key, name)), default)


def is_in_layers(name: str, config: LoraConfig) -> bool:
    """Whether ``layers_to_transform`` and ``layers_pattern`` admit the target ``name``."""
    wanted = _layers(config)
    return not wanted or _layer_of(name, config) in wanted


def suffixes(names: Iterable[str]) -> list[str]:
    """The distinct last components of dotted names, in order of appearance."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))


@dataclasses.dataclass(frozen=True)
class Names:
    """The dotted names in a model."""

    # All modules except the model itself.
    modules: Collection[str]
    # The modules that can be adapted: linear layers and embeddings.
    adaptable: Collection[str]
    parameters: Collection[str]
    # The parameters that are stacked experts.
    stacks: Collection[str]


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
        raise AdapterError("RW401", _nothing_matches(config, modules, model))
    wrong = [name for name in matched if not is_adaptable(modules[name])]
    if not wrong:
        return matched
    reasons = {name: reason for name in wrong if (reason := why_not(modules[name]))}
    first = next(iter(reasons), wrong[0])
    reason = reasons.get(first, "is neither a linear layer nor an embedding")
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    remedy = f"name linear layers, such as {_examples(modules)}"
    if foreign_format(modules[first]):
        remedy = "give the dense checkpoint, which --method qlora quantizes while it loads, or adapt other modules"
    raise AdapterError("RW402", f"{first} ({type(modules[first]).__name__}){more} {reason}; {remedy}.")


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
    return matches(name, wanted) and is_in_layers(name, config) and not (is_list and is_unread)


def _nothing_matches(config: LoraConfig, modules: Modules, model: str) -> str:
    limits = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    narrowed = " and ".join(name for name in limits if getattr(config, name))
    asked = f"target_modules={_shown(config.target_modules)}" + (f" (with {narrowed})" if narrowed else "")
    return f"{asked} matches none of the {model}'s modules; its linear layers end in {_examples(modules)}."


def _examples(modules: Modules) -> str:
    return ", ".join(suffixes(name for name, module in modules.items() if is_linear(module))[:8]) or "(none)"


def _shown(wanted: str | Sequence[str] | None) -> str:
    return repr(wanted) if isinstance(wanted, str) or wanted is None else f"[{_listed(wanted)}]"


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


def check_targets(config: LoraConfig, names: Names) -> None:
    """Raise AdapterError (RW401) with all targets that match nothing."""
    problems = dict(_missing_targets(config, names))
    if problems:
        raise AdapterError("RW401", f"{'; '.join(problems.values())}.")


def warn_of_idle(config: LoraConfig, names: Names, adapted: Collection[str], *, targets: bool = False) -> None:
    """Warn (RW420) about settings that match nothing, other than the targets.

    ``targets`` adds those that ``check_targets`` refuses. ``adapted``: the modules and stacked experts to adapt.
    """
    idle = [*(_missing_targets(config, names) if targets else ()), *_idle(config, names, adapted)]
    if idle:
        warn(NO_EFFECT, f"{'; '.join(dict(idle).values())}; what is named here has no effect.", stacklevel=3)


def _missing_targets(config: LoraConfig, names: Names) -> Iterator[tuple[str, str]]:
    """(setting, message with the names that match nothing and the closest names)."""
    yield from _missing_modules(config.target_modules, names)
    if missing := _unmatched(config.target_parameters, names.parameters):
        ends = ", ".join(dict.fromkeys(map(ending, names.stacks)))
        hint = f"its stacked experts are {ends}" if ends else _close(missing, names.parameters)
        yield (
            "target_parameters",
            f"target_parameters names {_listed(missing)}, which matches no parameter of the model, neither whole nor "
            f"at its end after a dot ({hint or 'it has no stacked experts'})",
        )
    lines = "\n".join([*names.modules, ""])
    if missing := [key for key in config.modules_to_save or () if f"{key}\n" not in lines]:
        hint = _close(missing, names.modules)
        text = f"modules_to_save names {_listed(missing)}, which is not in the model"
        yield "modules_to_save", f"{text} ({hint})" if hint else text
    there = _layers_there(config, names) if _layers(config) else set()
    if beyond := sorted(_layers(config) - there):
        known = f"layers {min(there)} to {max(there)}" if there else "no such layers"
        yield "layers_to_transform", f"layers_to_transform names {_listed(beyond)}, and the model has {known}"


def _missing_modules(wanted: str | Sequence[str] | None, names: Names) -> Iterator[tuple[str, str]]:
    ends = f"adapters fit layers that end in {', '.join(suffixes(names.adaptable)[:8]) or '(none)'}"
    if isinstance(wanted, str):
        if wanted.lower() != ALL_LINEAR and not any(matches(name, wanted) for name in names.modules):
            hint = _close([wanted], names.adaptable) or ends
            yield "target_modules", f"target_modules={wanted!r} matches none of the model's modules ({hint})"
    elif missing := _unmatched(wanted, names.modules):
        hint = (
            f'"{ALL_LINEAR}" takes no other names'
            if ALL_LINEAR in missing
            else _close(missing, names.adaptable) or ends
        )
        yield (
            "target_modules",
            f"target_modules names {_listed(missing)}, which matches no module of the model ({hint})",
        )


def _idle(config: LoraConfig, names: Names, adapted: Collection[str]) -> Iterator[tuple[str, str]]:
    wanted = config.exclude_modules
    if isinstance(wanted, str):
        nothing = [] if any(matches(name, wanted) for name in names.modules) else [wanted]
    else:
        nothing = _unmatched(wanted, names.modules)
    if nothing:
        hint = _close(nothing, names.adaptable) or _close(nothing, names.modules)
        text = f"exclude_modules names {_listed(nothing)}, which matches no module of the model"
        yield "exclude_modules", f"{text} ({hint})" if hint else text
    for setting in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, setting)
        if nothing := [key for key in keys if not any(matches_pattern(key, name) for name in adapted)]:
            ends = _close(nothing, adapted) or f"the adapted modules end in {', '.join(suffixes(adapted)[:8])}"
            yield setting, f"{setting} names {_listed(nothing)}, which matches no adapted module ({ends})"


def _unmatched(wanted: Sequence[str] | None, names: Collection[str]) -> list[str]:
    known = set(itertools.chain.from_iterable(map(_endings, names)))
    return [key for key in wanted or () if key not in known]


def _listed(items: Iterable[object]) -> str:
    named = list(dict.fromkeys(items))
    more = f" and {len(named) - MOST_NAMED:,} more" if len(named) > MOST_NAMED else ""
    return ", ".join(map(repr, named[:MOST_NAMED])) + more


def _close(missing: Iterable[object], names: Iterable[str]) -> str:
    """``did you mean q_proj, v_proj?``, or an empty string."""
    known = {name.lower(): name for name in suffixes(names)}
    last = [str(key).rpartition(".")[2].lower() for key in itertools.islice(missing, MOST_NAMED)]
    close = [known[item] for key in last for item in difflib.get_close_matches(key, known, n=2, cutoff=0.5)]
    return f"did you mean {', '.join(dict.fromkeys(close))}?" if close else ""


def _layers(config: LoraConfig) -> set[int]:
    wanted = config.layers_to_transform
    return {wanted} if isinstance(wanted, int) else set(wanted or ())


def _layer_patterns(config: LoraConfig) -> Sequence[str]:
    patterns = config.layers_pattern or (r"[^.]*",)
    return [patterns] if isinstance(patterns, str) else patterns


def _layer_of(name: str, config: LoraConfig) -> int | None:
    found = (_index_in(pattern, name) for pattern in _layer_patterns(config))
    return next((index for index in found if index is not None), None)


def _index_in(pattern: str, name: str) -> int | None:
    # The first index in the path is the layer's; a later one may be an expert's.
    found = _compiled(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.").match(name)
    return int(found["index"]) if found else None


def _layers_there(config: LoraConfig, names: Names) -> set[int]:
    found = (_layer_of(name, config) for name in names.modules)
    return {index for index in found if index is not None}
