"""The modules of a shape that an adapter changes, and the parameters that it adds, by `rankwise.matching`. No torch.

r rank, (in, out) of a layer; with enabled parts, n of p equal parts adapt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from math import prod

from rankwise.errors import AdapterError
from rankwise.lora_config import LoraConfig
from rankwise.matching import (
    OUTSIDE_TEXT,
    Names,
    Place,
    Places,
    check_enable_lora,
    check_targets,
    enabled_parts,
    left_out,
    matches,
    pattern_value,
    target_names,
    warn_of_experts,
    warn_of_idle,
    warn_of_no_bias,
    warn_of_no_dropout,
)
from rankwise.planning.shape import Module, Shape


@dataclasses.dataclass(frozen=True)
class Adapted:
    """One adapted module: shapes of A, B and, for DoRA, m."""

    module: Module
    r: int
    parts: tuple[bool, ...] | None
    use_dora: bool

    @property
    def rank(self) -> int:
        """The rank of the whole update: r for each enabled part."""
        return self.r * (1 if self.parts is None else sum(self.parts))

    @property
    def rows(self) -> int:
        """The number of adapted output rows: out, or n out / p."""
        out = self.module.outputs
        return out if self.parts is None else sum(self.parts) * (out // len(self.parts))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """A (n r, in), B (rows, r), m (rows,)."""
        pair = ((self.rank, self.module.inputs), (self.rows, self.r))
        return (*pair, (self.rows,)) if self.use_dora else pair

    @property
    def parameters(self) -> int:
        """``r (in + out)``, and ``out`` more for DoRA's magnitude."""
        return self.rank * self.module.inputs + self.rows * self.r + (self.rows if self.use_dora else 0)


@dataclasses.dataclass(frozen=True)
class AdaptedStack:
    """One adapted stack of E experts (out, in)."""

    module: Module
    leaf: str
    experts: int
    outputs: int
    inputs: int
    r: int

    @property
    def name(self) -> str:
        return f"{self.module.name}.{self.leaf}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """A (E, r, in), B (E, out, r)."""
        return (self.experts, self.r, self.inputs), (self.experts, self.outputs, self.r)

    @property
    def parameters(self) -> int:
        """``E r (in + out)``."""
        return self.experts * self.r * (self.inputs + self.outputs)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """All trained parts: low-rank pairs of modules and of stacked experts, modules trained whole, biases."""

    adapted: tuple[Adapted, ...]
    whole: tuple[Module, ...]
    biases: tuple[Module, ...]
    stacks: tuple[AdaptedStack, ...] = ()

    @property
    def pairs(self) -> tuple[Adapted | AdaptedStack, ...]:
        return (*self.adapted, *self.stacks)

    @property
    def parameters(self) -> int:
        pairs = sum(item.parameters for item in self.pairs)
        return pairs + sum(item.parameters for item in self.whole) + sum(item.outputs for item in self.biases)


def adaptation(shape: Shape, config: LoraConfig) -> Adaptation:
    """What ``add_adapter`` would train. Raises AdapterError (RW401 to RW403, RW419) and warns (RW420) as it does."""
    names = _names(shape)
    check_targets(config, names)
    stacks = tuple(_stacks(shape, config))
    adapted = tuple(_adapted(shape, config, may_be_none=bool(stacks) and not config.target_modules))
    check_enable_lora(config, [item.module.name for item in adapted])
    experts = {f"{item.name}.{leaf}": prod(size) for item in shape.modules for leaf, size in zip(STACKS, item.stacks)}
    adapted_stacks = [item.name for item in stacks]
    warn_of_experts(config, left_out(config, experts, experts, adapted_stacks, shape.parameters))
    places = _places(shape)
    warn_of_no_dropout(config, [places[item.module.name] for item in adapted])
    warn_of_idle(config, names, [*(item.module.name for item in adapted), *adapted_stacks])
    whole = tuple(module for module in shape.modules if config.trains_whole(module.name))
    biases = tuple(_biases(shape, config, adapted, whole))
    warn_of_no_bias(config, biases)
    return Adaptation(adapted, whole, biases, stacks)


def _stacks(shape: Shape, config: LoraConfig) -> Iterator[AdaptedStack]:
    wanted = config.target_parameters or ()
    for name, module in _parameters(shape).items() if wanted else ():
        if not matches(name, wanted):
            continue
        if (reason := _obstacle(module, config)) is not None:
            raise AdapterError(
                "RW419", f"target_parameters matches {name}, which cannot be adapted: {reason}; leave it out."
            )
        leaf = name.rpartition(".")[2]
        r = pattern_value(config.rank_pattern, name, config.r)
        yield AdaptedStack(module, leaf, *module.stacks[STACKS.index(leaf)], r)


# Names of a module's stacks.
STACKS = ("gate_up_proj", "down_proj")


def _names(shape: Shape) -> Names:
    parameters = _parameters(shape)
    return Names(
        modules=[*_containers(shape), *(module.name for module in shape.modules)],
        adaptable=[item.name for item in shape.modules if item.is_adaptable],
        parameters=list(parameters),
        stacks=[name for name, module in parameters.items() if module.stacks],
    )


def _parameters(shape: Shape) -> dict[str, Module]:
    return {f"{module.name}.{leaf}": module for module in shape.modules for leaf in _leaves(module)}


def _leaves(module: Module) -> tuple[str, ...]:
    return STACKS if module.stacks else ("weight", "bias") if module.bias else ("weight",)


def _obstacle(module: Module, config: LoraConfig) -> str | None:
    if not module.stacks:
        return "it is not a stack of experts' matrices (linear layers go into target_modules)"
    if config.trains_whole(module.name):
        return f"modules_to_save trains {module.name} whole"
    return None


def _adapted(shape: Shape, config: LoraConfig, *, may_be_none: bool) -> Iterator[Adapted]:
    places = _places(shape)
    modules = {module.name: module for module in shape.modules}
    for name in target_names(config, places, f"{shape.family} model", may_be_none=may_be_none):
        r = pattern_value(config.rank_pattern, name, config.r)
        yield Adapted(modules[name], r, enabled_parts(config, name, places[name]), config.use_dora)


def _places(shape: Shape) -> Places:
    head = shape.modules[-1]
    found = {
        item.name: Place(
            item.kind,
            item.is_linear,
            item.is_adaptable,
            item is head,
            item.outputs,
            unread="" if item is head or item.name.startswith(shape.text) else OUTSIDE_TEXT,
        )
        for item in shape.modules
    }
    return found | {name: Place("a block of layers") for name in _containers(shape)}


def _containers(shape: Shape) -> list[str]:
    """Paths of modules that hold others."""
    paths = {module.name.rsplit(".", depth)[0] for module in shape.modules for depth in range(1, 5)}
    return sorted(paths - {module.name for module in shape.modules})


def _biases(shape: Shape, config: LoraConfig, adapted: Sequence[Adapted], whole: Sequence[Module]) -> Iterator[Module]:
    """Modules whose bias trains."""
    if config.bias == "none":
        return
    names = {item.module.name for item in adapted}
    saved = {module.name for module in whole}
    for module in shape.modules:
        if module.bias and module.name not in saved and (config.bias == "all" or module.name in names):
            yield module
