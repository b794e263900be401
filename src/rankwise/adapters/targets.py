"""Which modules of a model an adapter configuration names, by the rules of PEFT, and what to say when none matches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from rankwise.adapters.base_layer import features, is_adaptable, is_linear
from rankwise.config import ALL_LINEAR, LoraConfig
from rankwise.errors import AdapterError

Value = TypeVar("Value")


Modules = Mapping[str, nn.Module]
"""A model's modules by name, the model itself under the empty name, as ``named_modules`` gives them."""


def target_names(modules: Modules, head: nn.Module | None, config: LoraConfig) -> list[str]:
    """Names of the modules to adapt, in the model's order. ``head`` is the output head that "all-linear" leaves out.

    Raises AdapterError: RW401 nothing matches, RW402 something matches that is no linear layer or embedding.
    """
    matched = [name for name, module in modules.items() if name and _is_target(name, module, head, config)]
    if not matched:
        raise AdapterError("RW401", _nothing_matches(modules, config))
    wrong = [name for name in matched if not is_adaptable(modules[name])]
    if wrong:
        kinds = ", ".join(f"{name} ({type(modules[name]).__name__})" for name in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise AdapterError(
            "RW402",
            f"target_modules={_shown(config.target_modules)} matches {kinds}{more}, which no adapter can wrap; name "
            f"linear layers, such as {_examples(modules)}.",
        )
    return matched


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """A string is a full-match regular expression; a list matches whole names or their ends after a dot."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first key that matches ``(.*\\.)?(KEY)$``, as in PEFT's rank_pattern and alpha_pattern."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def enabled_parts(config: LoraConfig, name: str, module: nn.Module) -> tuple[bool, ...] | None:
    """The parts of a fused projection that adapt, or None for a layer that adapts whole. Raises RW403."""
    for key, parts in config.enable_lora.items():
        if not matches(name, [key]):
            continue
        out_features = features(module)[1]
        if not is_linear(module) or out_features % len(parts):
            raise AdapterError(
                "RW403",
                f"enable_lora[{key!r}] splits {name} into {len(parts)} equal parts, and it has {out_features} output "
                "rows; give as many values as the projection has parts.",
            )
        return tuple(bool(part) for part in parts)
    return None


def check_enable_lora(config: LoraConfig, names: Sequence[str]) -> None:
    """Raises AdapterError (RW403) for an enable_lora key that names no adapted module."""
    unused = [key for key in config.enable_lora if not any(matches(name, [key]) for name in names)]
    if unused:
        raise AdapterError(
            "RW403",
            f"enable_lora names {', '.join(unused)}, and no adapted module ends in that; the adapted modules end in "
            f"{', '.join(suffixes(names))}.",
        )


def module_names(modules: Modules, wanted: Sequence[str]) -> list[str]:
    """The modules that ``modules_to_save`` names. Raises AdapterError (RW404) for a name that is not in the model."""
    found: list[str] = []
    for key in wanted:
        names = [name for name in modules if name and matches(name, [key])]
        if not names:
            close = difflib.get_close_matches(key, suffixes(modules), n=3)
            hint = f"; close names are {', '.join(close)}" if close else ""
            raise AdapterError("RW404", f"modules_to_save names {key!r}, which is not in the model{hint}.")
        found += names
    return list(dict.fromkeys(found))


def suffixes(names: Iterable[str]) -> list[str]:
    """The different last components of dotted names, in order of appearance."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))


def _is_target(name: str, module: nn.Module, head: nn.Module | None, config: LoraConfig) -> bool:
    wanted = config.target_modules
    if wanted is None or (config.exclude_modules and matches(name, config.exclude_modules)):
        return False
    if config.trains_whole(name):
        return False
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return is_linear(module) and module is not head
    # As in PEFT a whole name chooses its layer itself.
    is_whole = not isinstance(wanted, str) and name in wanted
    return is_whole or (matches(name, wanted) and _in_layers(name, config))


def _in_layers(name: str, config: LoraConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == () or wanted == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first index in the path counts; a later one may be an expert's.
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _nothing_matches(modules: Modules, config: LoraConfig) -> str:
    wanted = config.target_modules
    asked = [wanted] if isinstance(wanted, str) else list(wanted or [])
    known = suffixes(name for name, module in modules.items() if is_adaptable(module))
    close = [
        name for key in asked for name in difflib.get_close_matches(key.rpartition(".")[2], known, n=2, cutoff=0.5)
    ]
    hint = (
        f"did you mean {', '.join(dict.fromkeys(close))}?"
        if close
        else f"its linear layers end in {_examples(modules)}."
    )
    limits = [name for name in ("exclude_modules", "layers_to_transform", "layers_pattern") if getattr(config, name)]
    narrowed = f" (with {' and '.join(limits)})" if limits else ""
    return (
        f"target_modules={_shown(wanted)}{narrowed} matches none of the {type(modules['']).__name__}'s modules; {hint}"
    )


def _examples(modules: Modules) -> str:
    return ", ".join(suffixes(name for name, module in modules.items() if is_linear(module))[:8]) or "(none)"


def _shown(wanted: str | Sequence[str] | None) -> str:
    return repr(wanted) if isinstance(wanted, str) or wanted is None else repr(list(wanted))
