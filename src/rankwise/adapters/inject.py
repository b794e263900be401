"""Add adapters to a model. The model keeps its class; its target layers are wrapped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import nn

from rankwise.adapters.base_layer import make_readable, weight_device
from rankwise.adapters.beginning import Beginning, Pair, beginning
from rankwise.adapters.experts import AdaptedExperts, ExpertsLora, StackLora, stack_shape
from rankwise.adapters.layer import AdaptedLayer, Origin, TrainedCopy
from rankwise.adapters.lora import KINDS, Dora, EmbeddingLora, LowRankPair, TokenRows
from rankwise.adapters.saving import SavePretrained
from rankwise.adapters.select import (
    Candidates,
    check_enable_lora,
    check_targets,
    experts_left_out,
    idle_limits,
    idle_targets,
    module_names,
    parameter_names,
    target_names,
    unread_modules,
    warn_of_experts,
    warn_of_idle,
    warn_of_unread,
)
from rankwise.adapters.state import (
    DEFAULT_NAME,
    AdaptedModule,
    AdapterReport,
    AdapterState,
    adapter_state,
    base_modules,
    model_end,
    planned_module,
    planned_stack,
    planned_tokens,
    planned_whole,
    replace_parameter,
    report,
    tied_head,
    wrappers,
)
from rankwise.adapters.switch import disable_adapter, set_adapter, trained_biases
from rankwise.compat.torch import gathered
from rankwise.errors import AdapterError, ConfigError, some_of
from rankwise.lora_config import LoraConfig

Kind = TypeVar("Kind", AdaptedLayer, AdaptedExperts, TrainedCopy)


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    *,
    name: str = DEFAULT_NAME,
    originals: nn.Module | None = None,
) -> AdapterReport:
    """Freeze the model, add a new adapter to its target modules in place, and make it the active one.

    Args:
        model: Any PyTorch model, dense or 4-bit.
        config: The configuration of the adapter.
        name: The adapter's name among those of the model.
        originals: For ``init_lora_weights`` "pissa" and "loftq" over a 4-bit base, the model before quantization. By
            default the weights of a model that ``load_model`` quantized are read again.

    Returns:
        The adapted modules and the experts that were left out; ``print`` shows them in words.

    Raises:
        AdapterError: RW401, RW402 and RW419 for targets that are missing or cannot be adapted, RW434
            for token ids without a row, RW405 for a name that is taken or invalid, RW406 for a second adapter where
            one changes the base, RW408 while an adapter is merged, RW426 for an init that is not
            possible. The model is then unchanged.

    Warns of layers that text does not pass through (RW177), of settings that match nothing (RW420), and of experts that
    "all-linear" leaves out (RW422).
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            "RW101", f"config is a {type(config).__name__} of {type(config).__module__}; give rw.LoraConfig."
        )
    planned = plan_adapter(model, config, name)
    start = beginning(model, config, planned, originals)
    return attach(model, config, planned, name, start=start)


def plan_adapter(
    model: nn.Module, config: LoraConfig, name: str = DEFAULT_NAME, *, is_foreign: bool = False
) -> list[AdaptedModule]:
    """The modules that ``add_adapter`` would adapt. Checks everything and changes nothing.

    ``is_foreign``: PEFT may have written the configuration. Since PEFT accepts targets that are not in the model, they
    give a warning (RW420) instead of an error. Raises AdapterError as ``add_adapter`` does.
    """
    check_name(model, config, name)
    modules = dict(base_modules(model))
    if not is_foreign:
        check_targets(config, modules)
    stacks = parameter_names(modules, config)
    # With an empty list of target_modules only the stacked experts are adapted.
    stacks_suffice = bool(stacks) and (is_foreign or not config.target_modules)
    # A PEFT file may hold an adapter on what text does not pass through.
    among = Candidates(modules, model_end(model, "output"), () if is_foreign else unread_modules(model, modules))
    targets = target_names(config, among, type(model).__name__, may_be_none=stacks_suffice)
    check_enable_lora(config, targets)
    idle = idle_targets(config, modules) if is_foreign else []
    warn_of_idle([*idle, *idle_limits(config, modules, [*targets, *stacks])])
    if not is_foreign:
        warn_of_unread(config, among)
        warn_of_experts(config, experts_left_out(modules, config, stacks))
    planned = [planned_module(config, target, modules[target]) for target in targets]
    odd = [item.name for item in planned if config.for_merge == "q4_0" and item.in_features % 32]
    if odd:
        raise AdapterError(
            "RW402", f"{some_of(odd)}: Q4_0 takes rows of 32 inputs at a time, and these do not divide so; take nf4."
        )
    planned += [planned_stack(config, stack, modules) for stack in stacks]
    saved = module_names(modules, config.modules_to_save or ())
    if packed := [item for item in saved if not all(p.is_floating_point() for p in modules[item].parameters())]:
        raise AdapterError(
            "RW402", f"{some_of(packed)}: quantized weights cannot train whole; leave them out of modules_to_save."
        )
    planned += [planned_whole(item, modules[item]) for item in saved]
    planned += _planned_rows(model, config, modules, {item.name for item in planned})
    _check_beside(model, planned)
    return planned


def _check_beside(model: nn.Module, planned: Sequence[AdaptedModule]) -> None:
    """Raise AdapterError (RW406) if one adapter trains a module whole and another adapts it or a part of it."""
    # {path: whether the module trains whole}.
    there = {path: isinstance(module, TrainedCopy) for path, module in wrappers(model)}
    asked = {item.path: item.kind == "trained whole" for item in planned}
    if any(item.kind == "new tokens" for item in planned) and (head := tied_head(model)):
        asked[head] = False
    clash = _inside_of_whole(asked, there) or _inside_of_whole(there, asked)
    if clash is not None:
        whole, path = clash
        raise AdapterError(
            "RW406",
            f"one adapter trains {whole} whole (modules_to_save) and another adapts {path}, which one model cannot "
            "hold; remove the other with rankwise.remove_adapter, or load this one into a model of its own.",
        )


def _inside_of_whole(one: Mapping[str, bool], other: Mapping[str, bool]) -> tuple[str, str] | None:
    """The first module that ``one`` trains whole, with the module in it, or itself, that ``other`` adapts."""
    for whole in (path for path, is_whole in one.items() if is_whole):
        for path, is_whole in other.items():
            if path.startswith(f"{whole}.") or (path == whole and not is_whole):
                return whole, path
    return None


def _planned_rows(
    model: nn.Module, config: LoraConfig, modules: Mapping[str, nn.Module], taken: Collection[str]
) -> list[AdaptedModule]:
    """The modules of ``trainable_token_indices``. Raises AdapterError (RW434) for a module that lacks a row."""
    planned: list[AdaptedModule] = []
    if not config.token_rows:
        return planned
    embedding, head = model_end(model, "input"), model_end(model, "output")
    ends = {name: module for name, module in modules.items() if module is embedding or module is head}
    tied = len({id(module.get_parameter("weight")) for module in ends.values()}) < len(ends)
    if tied and any(module is head and name in taken for name, module in ends.items()):
        # The head gets the embedding's rows too.
        taken = {*taken, *ends}
    for key, ids in config.token_rows.items():
        names = [name for name, module in modules.items() if module is embedding]
        names = names if key is None else module_names(modules, [key])
        fits = [name for name in names if isinstance(modules[name], nn.Embedding | nn.Linear) and name not in taken]
        if len(fits) != 1 or len(names) != 1:
            raise AdapterError(
                "RW434",
                f"trainable_token_indices names {'the input embedding' if key is None else repr(key)}, which is "
                f"{', '.join(names) or 'no module'}; name one embedding or head that is neither adapted otherwise nor "
                "tied to one that is.",
            )
        weight = modules[fits[0]].get_parameter("weight")
        if any(modules[item.name].get_parameter("weight") is weight for item in planned):
            # The tied head of an embedding that is named too.
            continue
        rows = weight.shape[0]
        if max(ids) >= rows:
            raise AdapterError(
                "RW434",
                f"trainable_token_indices names token {max(ids)}, and {fits[0]} has {rows:,} rows; call "
                "model.resize_token_embeddings first.",
            )
        planned.append(planned_tokens(fits[0], modules[fits[0]], ids))
    return planned


def attach(
    model: nn.Module,
    config: LoraConfig,
    planned: list[AdaptedModule],
    name: str,
    *,
    trainable: bool = True,
    start: Beginning | None = None,
) -> AdapterReport:
    """Carry out a plan: wrap the modules, initialise the adapter, and make it the active one."""
    state = adapter_state(model, create=True)
    if state.active is not None:
        disable_adapter(model)
    make_readable(model)
    state.configs[name] = config
    if not trainable:
        state.inference_only.add(name)
    for item in planned:
        if item.kind == "trained whole":
            _wrap(model, item.name, TrainedCopy).add(name)
        elif item.kind == "new tokens":
            _add_rows(model, item, name)
        elif item.experts is not None:
            _add_stack(_wrap(model, item.path, AdaptedExperts), config, item, name)
        else:
            layer = _wrap(model, item.name, AdaptedLayer)
            # DoRA's magnitudes are norms of whole rows.
            with nullcontext() if config.kind == "lora" else gathered(model, item.name):
                pair = _begin(layer, item, config, start)
                adapter = _new_adapter(config, item, layer.base_layer, pair).train(layer.training)
            layer.adapters[name] = adapter
            layer.is_head = layer.base_layer is model_end(model, "output")
            if isinstance(adapter, LowRankPair) and not layer.is_head:
                adapter.for_merge = config.for_merge
    for key, bias in trained_biases(model, config, name).items():
        replace_parameter(model, state, name, key, bias)
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
    set_adapter(model, name)
    return report(model, name)


def _add_rows(model: nn.Module, item: AdaptedModule, name: str) -> None:
    """Add trained rows to an embedding or a head; a head that is tied to the embedding gets the same rows."""
    layer = _wrap(model, item.name, AdaptedLayer)
    own = TokenRows(layer.base_layer, list(item.tokens))
    layer.adapters[name] = own.train(layer.training)
    layer.is_head = layer.base_layer is model_end(model, "output")
    head = tied_head(model)
    if head is None or layer.base_layer is not model_end(model, "input"):
        return
    tied = _wrap(model, head, AdaptedLayer)
    tied.adapters[name] = TokenRows(tied.base_layer, list(item.tokens), own.rows).train(tied.training)
    tied.is_head = True


def _add_stack(experts: AdaptedExperts, config: LoraConfig, item: AdaptedModule, name: str) -> None:
    if name not in experts.adapters:
        experts.adapters[name] = ExpertsLora().train(experts.training)
    stack = stack_shape(experts.base_layer, item.leaf)
    lora = StackLora(stack, item.r, config.scaling(item.r, item.lora_alpha))
    lora.reset_parameters(zero_b=config.init.kind != "random")
    experts.adapter(name).stacks[item.leaf] = lora


@torch.no_grad()
def _begin(layer: AdaptedLayer, item: AdaptedModule, config: LoraConfig, start: Beginning | None) -> Pair | None:
    """The pair with which a layer starts. PiSSA also subtracts it from the base."""
    base = layer.base_layer
    pair = None if start is None else start.pair(item, base)
    if start is None or pair is None or config.init.kind != "pissa":
        return pair
    layer.origin = Origin(*pair, config.scaling(item.r, item.lora_alpha))
    layer.base_layer = layer.origin.taken_out_of(base, start.weight(item, base))
    return pair


def _new_adapter(
    config: LoraConfig, item: AdaptedModule, base: nn.Module, pair: Pair | None
) -> LowRankPair | EmbeddingLora:
    device, scaling = weight_device(base), config.scaling(item.r, item.lora_alpha)
    adapter: LowRankPair | EmbeddingLora
    if isinstance(base, nn.Embedding):
        adapter = EmbeddingLora(base, item.r, scaling, use_dora=config.use_dora, device=device)
    else:
        kind = KINDS[config.kind]
        adapter = kind(base, item.r, scaling, dropout=config.lora_dropout, parts=item.parts, device=device)
    adapter.reset_parameters(base, zero_b=config.init.kind != "random")
    if pair is not None:
        with torch.no_grad():
            adapter.lora_A.copy_(pair[0])
            adapter.lora_B.copy_(pair[1])
            if isinstance(adapter, Dora):
                adapter.magnitude.copy_(adapter.row_norms(base))
    return adapter


def _wrap(model: nn.Module, path: str, kind: type[Kind]) -> Kind:
    module = model.get_submodule(path)
    if isinstance(module, kind):
        return module
    wrapper = kind(module).train(module.training)
    model.set_submodule(path, wrapper)
    return wrapper


def check_name(model: nn.Module, config: LoraConfig, name: str) -> None:
    state = getattr(model, "rankwise_adapters", AdapterState())
    configs = state.configs
    if state.merged is not None:
        raise AdapterError("RW408", "an adapter is merged into the weights; call unmerge_adapter(model) first.")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise AdapterError("RW405", f"{name!r} cannot name an adapter; use one without dots that torch does not use.")
    if name in configs:
        remedy = f"give a different name, or remove that one with rankwise.remove_adapter(model, {name!r})"
        raise AdapterError("RW405", f"the model already has an adapter {name!r}; {remedy}.")
    changing = (other.bias != "none" or other.init.kind == "pissa" for other in [*configs.values(), config])
    if configs and any(changing):
        raise AdapterError(
            "RW406",
            "an adapter that trains biases or starts by pissa changes the base, so no other adapter can be beside it; "
            'for several adapters use bias="none" and a different init.',
        )
