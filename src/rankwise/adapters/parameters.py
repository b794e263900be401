"""Which parameters of a model ``target_parameters`` names, by the rules of PEFT, and why one cannot be adapted."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from rankwise.adapters.targets import Modules, matches
from rankwise.config import LoraConfig
from rankwise.errors import AdapterError
from rankwise.quantization.experts import first_leaf, foreign, stack_at


def parameter_names(modules: Modules, config: LoraConfig) -> list[str]:
    """Names of the stacks of experts to adapt, in the model's order.

    Raises AdapterError: RW401 for a name that no parameter has, RW419 for parameters that are no stacked experts, or
    whose experts compute in a way of their own, or train whole.
    """
    wanted = config.target_parameters or ()
    names = list(_named(modules)) if wanted else []
    missing = [key for key in wanted if not any(matches(name, [key]) for name in names)]
    if missing:
        raise AdapterError("RW401", _nothing_matches(modules, names, missing))
    found = [name for name in names if matches(name, wanted)]
    reasons = {name: reason for name in found if (reason := _obstacle(modules, name, config)) is not None}
    if reasons:
        name, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise AdapterError(
            "RW419", f"target_parameters matches {name}{more}, which no adapter can reach: {reason}; leave it out."
        )
    return found


def _named(modules: Modules) -> Iterator[str]:
    for path, module in modules.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{leaf}" if path else leaf


def _obstacle(modules: Modules, name: str, config: LoraConfig) -> str | None:
    path, _, leaf = name.rpartition(".")
    module, parameter = modules[path], modules[path]._parameters[leaf]
    assert parameter is not None, "named"
    if stack_at(module, leaf) is None and parameter.dim() != 3:
        shape = tuple(parameter.shape)
        return f"it is {shape} and no stack of experts' matrices (linear layers go into target_modules)"
    if (reason := foreign(module, leaf)) is not None:
        return reason
    if leaf not in (first_leaf(module), "down_proj"):
        return f"{type(module).__name__} does not multiply by it"
    if config.trains_whole(path):
        return f"modules_to_save trains {path} whole"
    return None


def _nothing_matches(modules: Modules, names: list[str], missing: list[str]) -> str:
    stacks = list(dict.fromkeys(_ending(name) for name in names if _is_stack(modules, name)))
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = [item for key in missing for item in difflib.get_close_matches(key.rpartition(".")[2], known, n=2)]
    hint = f"its stacked experts are {', '.join(stacks)}." if stacks else "it has no stacked experts."
    if close and not stacks:
        hint = f"did you mean {', '.join(dict.fromkeys(close))}?"
    return (
        f"target_parameters={missing!r} matches no parameter of the {type(modules['']).__name__}, neither whole nor at "
        f"its end after a dot; {hint}"
    )


def _is_stack(modules: Modules, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    parameter = modules[path]._parameters[leaf]
    return foreign(modules[path], leaf) is None and parameter is not None


def _ending(name: str) -> str:
    """``mlp.experts.down_proj``."""
    return ".".join(name.split(".")[-3:])
