"""Which modules of a model an adapter configuration names, by the rules of PEFT, and what to say when none matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from rankwise.adapters.base_layer import features, is_adaptable, is_linear
from rankwise.config import ALL_LINEAR, LoraConfig
from rankwise.errors import AdapterError
from rankwise.matching import is_in_layers, matches, suffixes

Modules = Mapping[str, nn.Module]
"""A model's modules by name, the model itself under the empty name, as ``named_modules`` gives them."""


def target_names(
    modules: Modules, head: nn.Module | None, config: LoraConfig, *, may_be_none: bool = False
) -> list[str]:
    """Names of the modules to adapt, in the model's order. ``head`` is the output head that "all-linear" leaves out.

    Raises AdapterError: RW401 nothing matches, RW402 something matches that is no linear layer or embedding.
    """
    matched = [name for name, module in modules.items() if name and _is_target(name, module, head, config)]
    if not matched and not may_be_none:
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
    """The modules that ``modules_to_save`` names."""
    found = [name for key in wanted for name in modules if name and matches(name, [key])]
    return list(dict.fromkeys(found))


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
    return is_whole or (matches(name, wanted) and is_in_layers(name, config))


def _nothing_matches(modules: Modules, config: LoraConfig) -> str:
    limits = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    narrowed = " and ".join(name for name in limits if getattr(config, name))
    asked = f"target_modules={_shown(config.target_modules)}" + (f" (with {narrowed})" if narrowed else "")
    model = type(modules[""]).__name__
    return f"{asked} matches none of the {model}'s modules; its linear layers end in {_examples(modules)}."


def _examples(modules: Modules) -> str:
    return ", ".join(suffixes(name for name, module in modules.items() if is_linear(module))[:8]) or "(none)"


def _shown(wanted: str | Sequence[str] | None) -> str:
    return repr(wanted) if isinstance(wanted, str) or wanted is None else repr(list(wanted))
