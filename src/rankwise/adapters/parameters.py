"""The parameters that ``target_parameters`` selects by PEFT's rules, and the reasons why some cannot be adapted."""

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
