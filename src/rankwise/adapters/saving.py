"""Write adapters in PEFT's format: by ``save_adapter``, and by ``save_pretrained`` of a model with an adapter.

transformers' own ``save_pretrained`` would write the whole base, with the adapter's tensors under names that no other
program reads, and the folder would load as the untrained base. Trainers and ``push_to_hub`` call the method of the
model, so it is replaced on the model.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rankwise.adapters.experts import StackLora, peft_A, peft_B, peft_keys
from rankwise.adapters.folder import (
    CONFIG_FILE,
    INIT_KEY,
    LABELS_KEY,
    LABELS_TASK,
    MERGE_KEY,
    PARTS_FIELDS,
    PARTS_KEY,
    WEIGHTS_FILE,
    scaled_alpha,
    to_peft,
)
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.lora import KEY as TOKENS
from rankwise.adapters.lora import Dora, LowRankPair, TokenRows
from rankwise.adapters.low_rank import enabled_rows, to_blocks
from rankwise.adapters.select import matches, suffixes, unread_modules
from rankwise.adapters.state import (
    AdaptedModule,
    AdapterState,
    adapted_experts,
    adapted_layers,
    base_modules,
    base_parameter,
    report,
    stacks_of,
    state_and_name,
    trained_copies,
)
from rankwise.compat.transformers import heads_of_labels, is_experts_family
from rankwise.disk import whole_file
from rankwise.errors import AdapterError, warn
from rankwise.foreign import Fields
from rankwise.labels import Labels, labels_of_head
from rankwise.lora_config import LoraConfig
from rankwise.quantization.linear import is_conv1d
from rankwise.records import write_bytes, write_json

PREFIX = "base_model.model."
# The folder name of a transformers Trainer's checkpoint.
TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")
TRAINER_WEIGHTS = "model.safetensors"
# {option of ``save_pretrained`` that an adapter folder does not support: its neutral value}.
NOT_FOR_ADAPTERS = {"push_to_hub": False, "variant": None, "save_peft_format": True, "distributed_checkpoint": False}
# Layer names of unstacked experts. PEFT (0.21) maps these names in target_modules to the stacked experts.
FORMER_EXPERTS = ("gate_proj", "up_proj", "down_proj")


class SavePretrained:
    """Replaces a model's ``save_pretrained``; without an adapter, or after a merge, it calls the original method."""

    def __init__(self, model: nn.Module) -> None:
        # Weak, since a reference cycle would delay freeing the model.
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        model: Any = self._model()
        return SavePretrained(memo.get(id(model), model))

    def __reduce__(self) -> tuple[type[SavePretrained], tuple[nn.Module | None]]:
        return SavePretrained, (self._model(),)

    def __call__(self, *args: Any, **options: Any) -> None:
        model: Any = self._model()
        plain = type(model).save_pretrained
        state = getattr(model, "rankwise_adapters", AdapterState())
        if not state.configs or state.merged is not None:
            plain(model, *args, **options)
            return
        given = inspect.signature(plain).bind(model, *args, **options).arguments
        given |= given.pop("kwargs", {})
        _check_options(given)
        if given.get("is_main_process", True):
            _save(model, state, Path(given["save_directory"]), given.get("state_dict"))


def _check_options(given: Fields) -> None:
    asked = [f"{name}={given[name]!r}" for name, usual in NOT_FOR_ADAPTERS.items() if given.get(name, usual) != usual]
    if asked:
        raise AdapterError(
            "RW421",
            f"save_pretrained got {', '.join(asked)}, which an adapter's folder does not support; leave it out "
            "(model.push_to_hub(NAME) uploads), or call merge_adapter(model) first to save a whole model.",
        )


def _save(model: nn.Module, state: AdapterState, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write the active adapter into ``folder`` and every other into a subfolder of its name, as PEFT does."""
    assert state.active is not None, "a model with adapters has an active one, disabled or not"
    for name in state.configs:
        place = folder if name == state.active else folder / name
        save_adapter(model, place, name=name, state_dict=state_dict)
    if TRAINER_CHECKPOINT.fullmatch(folder.name):
        # A Trainer reads only this file when it resumes or loads the best checkpoint.
        live = {id(parameter) for parameter in adapter_parameters(model, state.active).values()}
        named = model.state_dict(keep_vars=True).items()
        source = {key: value for key, value in named if id(value) in live}
        # safetensors refuses shared memory, and a tied head shares the rows of new tokens: so copies are saved.
        tensors = {key: (state_dict or source)[key].detach().to("cpu", copy=True).contiguous() for key in source}
        write_bytes(folder / TRAINER_WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """{key in PEFT's file: parameter} of an adapter, by default the active one.

    A is (r, in), B is (out, r) and DoRA's magnitude is (out,). Adapters on E stacked experts have A (E, r, in) and B
    (E, out, r). A partly adapted fused projection has the compact A, B and m, which the file holds expanded; PiSSA has
    the r ranks that train, of the file's 2r. Raises AdapterError: RW407 for an unknown name, RW408 while merged.
    """
    state, name = state_and_name(model, name)
    found: dict[str, nn.Parameter] = {}
    for path, layer in adapted_layers(model, name):
        adapter = layer.adapter(name)
        if isinstance(adapter, TokenRows):
            found |= {} if adapter.is_tied else {f"{PREFIX}{path}.{TOKENS}": adapter.rows}
            continue
        for key, attribute in tensor_keys(path, layer.base_layer, adapter.vectors).items():
            found[key] = getattr(adapter, attribute)
    for path, experts in adapted_experts(model, name):
        found |= stack_parameters(path, stacks_of(experts, name))
    for path, copy in trained_copies(model, name):
        found |= {f"{PREFIX}{path}.{key}": value for key, value in copy.adapters[name].named_parameters()}
    kept = state.replaced.get(name, {}) if state.configs[name].bias != "none" else ()
    return found | {_key_of_base(model, name, key): base_parameter(model, key) for key in kept if key.endswith("bias")}


def _key_of_base(model: nn.Module, name: str, key: str) -> str:
    """The key in PEFT's file of a parameter of the base that the adapter replaces."""
    path, _, leaf = key.rpartition(".")
    layer = dict(adapted_layers(model, name)).get(path)
    is_rows = layer is not None and isinstance(layer.adapter(name), TokenRows)
    inner = "" if layer is None else ".token_adapter.base_layer" if is_rows else ".base_layer"
    return f"{PREFIX}{path}{inner}.{leaf}"


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter, by default the active one, as a PEFT folder. Each file is written whole or not at all.

    Args:
        model: A model with an adapter.
        folder: The folder for ``adapter_model.safetensors`` and ``adapter_config.json``, which is created.
        name: The adapter to write.
        base_model: The base that transformers loads for this folder; by default the model's ``name_or_path``.
        state_dict: Values to write instead of the model's own, under the keys of ``model.state_dict()``: for example
            values gathered from several processes.

    Raises:
        AdapterError: RW407 for an unknown name, RW408 while merged, RW421 if ``state_dict`` lacks a tensor.

    Warns (RW559) if PEFT cannot load the adapter.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, name = state_and_name(model, name)
    config = state.configs[name]
    modules = [item for item in report(model, name).modules if item.is_pair]
    document = to_peft(
        _as_one_lora(config, modules),
        _portable_targets(model, config, modules),
        base_model or getattr(model, "name_or_path", None) or None,
        is_transposed([layer.base_layer for _, layer in adapted_layers(model, name)]),
    )
    if not hasattr(model, "prepare_inputs_for_generation"):
        document["task_type"] = None
    _warn_of_former_experts(model, [path for path, _ in adapted_layers(model, name)])
    metadata = {"format": "pt"}
    if config.init.kind == "loftq":
        metadata[INIT_KEY] = config.init.kind
    if config.for_merge is not None:
        metadata[MERGE_KEY] = config.for_merge
    mark_labels(model, document, metadata)
    if config.enable_lora:
        metadata[PARTS_KEY] = json.dumps({name: dict(getattr(config, name)) for name in PARTS_FIELDS})
    write_tensors(folder, adapter_tensors(model, name, state_dict), metadata)
    write_json(folder / CONFIG_FILE, document)


def write_tensors(folder: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write an adapter's tensors. Equal ones give equal bytes: safetensors orders the metadata at random."""
    content = safetensors.torch.save(tensors, dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end]) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The tensors start at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    with whole_file(folder / WEIGHTS_FILE) as file:
        # In parts: a checkpoint must not need the adapter's memory once more.
        for part in (len(text).to_bytes(8, "little"), text, memoryview(content)[end:]):
            file.write(part)


def mark_labels(model: nn.Module, document: dict[str, Any], metadata: dict[str, str]) -> None:
    """Say in an adapter's configuration and file that its model answers with labels, and with which."""
    if heads_of_labels(model):
        document["task_type"] = LABELS_TASK
        metadata[LABELS_KEY] = json.dumps(labels_of(model).to_json())


def labels_of(model: Any) -> Labels:
    """The labels of a model that answers with labels."""
    return labels_of_head(model.config.id2label, model.config.problem_type)


def _warn_of_former_experts(model: nn.Module, adapted: list[str]) -> None:
    """Warn (RW559) if PEFT would put adapters of a mixture's dense layers or shared experts on its stacked experts.

    No spelling of target_modules avoids this, since PEFT uses only the last component of each entry and match.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    mistaken = (
        [end for end in FORMER_EXPERTS if any(matches(path, [end]) for path in adapted)]
        if is_experts_family(kind, "qwen2_moe")
        else []
    )
    if mistaken:
        warn(
            "RW559",
            f"PEFT cannot load this adapter: in a model of type {kind}, PEFT takes the target_modules "
            f"{', '.join(mistaken)} for the stacked experts. rankwise loads it, and `rankwise merge` makes a model for "
            f"any program; for an adapter that PEFT loads, train with --exclude-modules {','.join(mistaken)}.",
            stacklevel=3,
        )


def is_transposed(bases: list[nn.Module]) -> bool:
    """PEFT's fan_in_fan_out: whether all bases store W as (in, out). Stacked experts have their own flag in PEFT."""
    return bool(bases) and all(map(is_conv1d, bases))


def adapter_tensors(
    model: nn.Module, name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of an adapter as in PEFT's file, detached, on the CPU; ``state_dict`` as in `save_adapter`."""
    state, name = state_and_name(model, name)
    live: Mapping[str, Tensor] = adapter_parameters(model, name)
    found = live if state_dict is None else _taken_from(state_dict, model, live)
    tensors: dict[str, Tensor] = {key: value.detach() for key, value in found.items()}
    for path, layer in adapted_layers(model, name):
        if isinstance(adapter := layer.adapter(name), LowRankPair) and adapter.parts is not None:
            tensors |= _expanded(layer, name, tensor_keys(path, layer.base_layer, adapter.vectors), tensors)
    for path, experts in adapted_experts(model, name):
        stacked = stack_parameters(path, stacks_of(experts, name))
        tensors |= {key: peft_A(tensors[key]) if "lora_A" in key else peft_B(tensors[key]) for key in stacked}
    if state.configs[name].init.kind == "pissa":
        tensors |= _on_first_weights(model, name, tensors)
    for path, copy in trained_copies(model, name):
        buffers, stored = copy.adapters[name].named_buffers(), copy.original.state_dict()
        tensors |= {f"{PREFIX}{path}.{key}": value.detach() for key, value in buffers if key in stored}
    replaced = _replaced_tensors(model, state, name)
    tensors = replaced | tensors if is_at_work(state, name) else tensors | replaced
    return {key: tensors[key].cpu().contiguous() for key in sorted(tensors)}


def _taken_from(state_dict: Mapping[str, Tensor], model: nn.Module, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {id(value): key for key, value in model.state_dict(keep_vars=True).items()}
    missing = [key for key, value in live.items() if names[id(value)] not in state_dict]
    if missing:
        raise AdapterError(
            "RW421",
            f"state_dict lacks {len(missing)} of the adapter's tensors ({missing[0]}, ...); give the whole model's, or "
            "leave it out.",
        )
    return {key: state_dict[names[id(value)]] for key, value in live.items()}


def _expanded(
    layer: AdaptedLayer, name: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """B (out, n r) and m (out,) of a partly adapted projection, expanded to all rows."""
    adapter = layer.adapter(name)
    assert adapter.parts is not None, "partly adapted"
    key_of = {attribute: key for key, attribute in keys.items()}
    found = {key_of["lora_B"]: to_blocks(tensors[key_of["lora_B"]], adapter.parts)}
    if isinstance(adapter, Dora):
        m = adapter.full_magnitude(layer.base_layer)
        rows = enabled_rows(adapter.parts, m.shape[0], m.device)
        found[key_of["magnitude"]] = m.index_copy(0, rows, tensors[key_of["magnitude"]].to(m))
    return found


def _on_first_weights(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[A; A_0] and [B, -B_0]: PiSSA's pairs as LoRA of rank 2r on the original weights."""
    found: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model, name):
        if isinstance(layer.adapter(name), TokenRows):
            continue
        key_A, key_B, *_ = tensor_keys(path, layer.base_layer)
        A, B = tensors[key_A], tensors[key_B]
        # An embedding starts with the default, so nothing was subtracted from it.
        first = (
            (A.new_zeros(A.shape), B.new_zeros(B.shape)) if layer.origin is None else (layer.origin.A, layer.origin.B)
        )
        found |= {key_A: torch.cat([A, first[0].to(A)]), key_B: torch.cat([B, -first[1].to(B)], dim=1)}
    return found


def is_at_work(state: AdapterState, name: str) -> bool:
    return state.active == name and not state.disabled


def _replaced_tensors(model: nn.Module, state: AdapterState, name: str) -> dict[str, Tensor]:
    """{key in PEFT's file: the adapter's value} of replaced base parameters, read from the base while active."""
    at_work = is_at_work(state, name)
    return {
        _key_of_base(model, name, key): base_parameter(model, key).detach() if at_work else kept
        for key, kept in state.replaced.get(name, {}).items()
    }


def tensor_keys(path: str, base: nn.Module, vectors: Mapping[str, str] | None = None) -> dict[str, str]:
    """{key in PEFT's file: attribute of the adapter}, of A and B and of an adapter's ``vectors``."""
    start = f"{PREFIX}{path}."
    if isinstance(base, nn.Embedding):
        keys = {f"{start}lora_embedding_A": "lora_A", f"{start}lora_embedding_B": "lora_B"}
    else:
        keys = {f"{start}lora_A.weight": "lora_A", f"{start}lora_B.weight": "lora_B"}
    return keys | {f"{start}{end}": attribute for attribute, end in (vectors or {}).items()}


def stack_parameters(path: str, stacks: Mapping[str, StackLora]) -> dict[str, nn.Parameter]:
    starts = peft_keys(f"{PREFIX}{path}", list(stacks))
    found = {f"{starts[leaf]}lora_A.weight": lora.lora_A for leaf, lora in stacks.items()}
    return found | {f"{starts[leaf]}lora_B.weight": lora.lora_B for leaf, lora in stacks.items()}


def _as_one_lora(config: LoraConfig, modules: list[AdaptedModule]) -> LoraConfig:
    """The configuration with which PEFT computes the same: rank n r for fused projections, rank 2 r for PiSSA."""
    ranks, alphas, grow = {}, {}, scaled_alpha(config)
    if config.init.kind == "pissa":
        return dataclasses.replace(
            config,
            r=2 * config.r,
            lora_alpha=grow(config.lora_alpha, 2),
            rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
            alpha_pattern={key: grow(alpha, 2) for key, alpha in config.alpha_pattern.items()},
        )
    for item in modules:
        if item.parts is not None:
            ranks[item.name] = item.r * sum(item.parts)
            alphas[item.name] = grow(item.lora_alpha, sum(item.parts))
    return (
        dataclasses.replace(
            config,
            rank_pattern={**ranks, **config.rank_pattern, **ranks},
            alpha_pattern={**alphas, **config.alpha_pattern, **alphas},
        )
        if ranks
        else config
    )


def _portable_targets(model: nn.Module, config: LoraConfig, modules: list[AdaptedModule]) -> str | list[str]:
    """PEFT's target_modules. "all-linear" becomes a list of names, and so does a list in a model with layers that text
    does not pass through, where an ending may also match such a layer.
    """
    wanted = config.target_modules or ()
    if isinstance(wanted, str) and wanted != "all-linear":
        return wanted
    if not isinstance(wanted, str) and not unread_modules(model, dict(base_modules(model))):
        return sorted(wanted)
    names = [item.name for item in modules if item.experts is None]
    return names if config.exclude_modules else shortest_targets(model, names)


def shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """The last components of ``names`` if these match the modules ``names`` and no others, else ``names``."""
    endings = sorted(suffixes(names))
    same = {name for name, _ in base_modules(model) if name and matches(name, endings)} == set(names)
    return endings if same else names
