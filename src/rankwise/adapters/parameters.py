"""The parameters that ``target_parameters`` names, by PEFT's rules, and the reasons why some cannot be adapted."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from rankwise.adapters.base_layer import is_adaptable
from rankwise.adapters.targets import Modules
from rankwise.compat.torch import own_parameters
from rankwise.errors import AdapterError
from rankwise.lora_config import LoraConfig
from rankwise.matching import LeftOut, Names, left_out, matches
from rankwise.quantization.experts import first_leaf, foreign, stack_at
from rankwise.quantization.linear import weight_count


def parameter_names(modules: Modules, config: LoraConfig) -> list[str]:
    """Names of the stacks of experts to adapt, in the model's order.

    Raises AdapterError: RW419 for parameters that are not stacked experts, that train whole, or whose experts have
    their own way of computing.
    """
    wanted = config.target_parameters or ()
    found = [name for name in _named(modules) if matches(name, wanted)] if wanted else []
    reasons = {name: reason for name in found if (reason := _obstacle(modules, name, config)) is not None}
    if reasons:
        name, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise AdapterError(
            "RW419", f"target_parameters matches {name}{more}, which no adapter can reach: {reason}; leave it out."
        )
    return found


def names_in(modules: Modules) -> Names:
    """The names that an adapter's settings can use."""
    parameters = list(_named(modules))
    return Names(
        modules=[name for name in modules if name],
        adaptable=[name for name, module in modules.items() if name and is_adaptable(module)],
        parameters=parameters,
        stacks=[name for name in parameters if _is_stack(modules, name)],
    )


def experts_left_out(modules: Modules, config: LoraConfig, adapted: Collection[str]) -> LeftOut | None:
    """The stacked experts that are not among the adapted names; None where there are none."""
    stacks, distinct = {}, {}
    for name in _named(modules):
        path, _, leaf = name.rpartition(".")
        parameter = modules[path].get_parameter(leaf)
        distinct[id(parameter)] = weight_count(parameter)
        if _holds_experts(modules[path], leaf):
            stacks[name] = weight_count(parameter)
    reachable = [name for name in stacks if _obstacle(modules, name, config) is None]
    return left_out(config, stacks, reachable, adapted, sum(distinct.values()))


def _holds_experts(module: nn.Module, leaf: str) -> bool:
    # By the class's name too: Llama 4's and JetMoE's experts lack the interface.
    return stack_at(module, leaf) is not None or (
        module.get_parameter(leaf).dim() == 3 and "experts" in type(module).__name__.lower()
    )


def _named(modules: Modules) -> Iterator[str]:
    for path, module in modules.items():
        for leaf, parameter in own_parameters(module).items():
            if parameter is not None:
                yield f"{path}.{leaf}" if path else leaf


def _obstacle(modules: Modules, name: str, config: LoraConfig) -> str | None:
    path, _, leaf = name.rpartition(".")
    module = modules[path]
    parameter = module.get_parameter(leaf)
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


def _is_stack(modules: Modules, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return foreign(modules[path], leaf) is None
