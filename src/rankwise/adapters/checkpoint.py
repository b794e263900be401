"""Adapter folders in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, both ways.

Shapes in the file: lora_A (r, in), lora_B (out, r), lora_magnitude_vector (out,), lora_embedding_A (r, vocabulary),
lora_embedding_B (dim, r); of E stacked experts lora_A (E r, in) and lora_B (out, r E), see ``adapters.experts``. A
partly adapted fused projection is one LoRA of rank n r (see ``adapters.fused``); which parts adapt stands in the
metadata.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import is_conv1d
from rankwise.adapters.experts import (
    StackLora,
    from_peft_A,
    from_peft_B,
    ordered_stacks,
    peft_A,
    peft_B,
    peft_keys,
)
from rankwise.adapters.fused import enabled_rows, from_blocks, to_blocks
from rankwise.adapters.inject import (
    DEFAULT_NAME,
    AdaptedModule,
    AdapterReport,
    adapted_experts,
    adapted_layers,
    attach,
    disable_adapter,
    enable_adapter,
    plan_adapter,
    remove_adapter,
    report,
    stacks_of,
    trained_copies,
)
from rankwise.adapters.layer import AdaptedLayer, TrainedCopy
from rankwise.adapters.peft_config import CONFIG_FILE, from_peft, read_config, scaled_alpha, to_peft
from rankwise.adapters.state import (
    AdapterState,
    base_modules,
    base_parameter,
    inner_module,
    replace_parameter,
    state_and_name,
)
from rankwise.config import LoraConfig
from rankwise.errors import AdapterError, ConfigError
from rankwise.foreign import parse_json
from rankwise.matching import matches, suffixes
from rankwise.records import write_bytes, write_json
from rankwise.weights_file import WeightsHeader, read_header, refuse_pickles

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS_KEY = "rankwise.enable_lora"
PARTS_FIELDS = ("enable_lora", "rank_pattern", "alpha_pattern")
# What PEFT's fields cannot say of a fused projection; kept in the metadata.


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """{key in PEFT's file: live parameter} of an adapter, the active one by default.

    For a partly adapted fused projection the parameters are the compact A, B and m; the file holds them expanded. Those
    of E stacked experts are (E, r, in) and (E, out, r).
    """
    state, name = state_and_name(model, name)
    found: dict[str, nn.Parameter] = {}
    for path, layer in adapted_layers(model, name):
        adapter: Any = layer.adapters[name]
        for key, attribute in _tensor_keys(path, layer.base_layer, adapter.magnitude is not None).items():
            found[key] = getattr(adapter, attribute)
    for path, experts in adapted_experts(model, name):
        found |= _stack_parameters(path, stacks_of(experts, name))
    for path, copy in trained_copies(model, name):
        found |= {f"{PREFIX}{path}.{key}": value for key, value in copy.adapters[name].named_parameters()}
    adapted = {path for path, _ in adapted_layers(model, name)}
    for key in state.replaced.get(name, {}):
        path, _, leaf = key.rpartition(".")
        if leaf == "bias":
            found[f"{PREFIX}{path}{'.base_layer' if path in adapted else ''}.bias"] = base_parameter(model, key)
    return found


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter (the active one by default) as a PEFT folder, each file whole or not at all.

    ``base_model`` is what transformers' ``from_pretrained(folder)`` loads; by default the model's own name.
    ``state_dict``: the model's, gathered elsewhere, whose values are written in place of the live ones. Raises
    AdapterError (RW421) where it lacks some.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, name = state_and_name(model, name)
    config = state.configs[name]
    modules = [item for item in report(model, name).modules if item.kind != "trained whole"]
    document = to_peft(
        _as_one_lora(config, modules),
        _portable_targets(model, config, modules),
        base_model or getattr(model, "name_or_path", None) or None,
        _is_transposed([layer.base_layer for _, layer in adapted_layers(model, name)]),
    )
    metadata = {"format": "pt"}
    if config.enable_lora:
        metadata[PARTS_KEY] = json.dumps({name: _plain(getattr(config, name)) for name in PARTS_FIELDS})
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(adapter_tensors(model, name, state_dict), metadata))
    write_json(folder / CONFIG_FILE, document)


def _is_transposed(bases: list[nn.Module]) -> bool:
    """PEFT's fan_in_fan_out. It says nothing of stacked experts, of which PEFT asks the module."""
    return bool(bases) and all(map(is_conv1d, bases))


def adapter_tensors(
    model: nn.Module, name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of an adapter as PEFT's file has them, detached, on the CPU; ``state_dict`` as in `save_adapter`."""
    state, name = state_and_name(model, name)
    live: Mapping[str, Tensor] = adapter_parameters(model, name)
    found = live if state_dict is None else _taken_from(state_dict, model, live)
    tensors: dict[str, Tensor] = {key: value.detach() for key, value in found.items()}
    for path, layer in adapted_layers(model, name):
        if layer.adapters[name].parts is not None:
            tensors |= _expanded(layer, name, _tensor_keys(path, layer.base_layer, True), tensors)
    for path, experts in adapted_experts(model, name):
        stacked = _stack_parameters(path, stacks_of(experts, name))
        tensors |= {key: peft_A(tensors[key]) if "lora_A" in key else peft_B(tensors[key]) for key in stacked}
    for path, copy in trained_copies(model, name):
        tensors |= {f"{PREFIX}{path}.{key}": value.detach() for key, value in copy.adapters[name].named_buffers()}
    replaced = _replaced_tensors(model, state, name)
    tensors = replaced | tensors if _is_at_work(state, name) else tensors | replaced
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
    """B and m of a partly adapted projection over all its rows."""
    adapter: Any = layer.adapters[name]
    key_of = {attribute: key for key, attribute in keys.items()}
    found = {key_of["lora_B"]: to_blocks(tensors[key_of["lora_B"]], adapter.parts)}
    if adapter.magnitude is not None:
        m = adapter.full_magnitude(layer.base_layer)
        rows = enabled_rows(adapter.parts, m.shape[0], m.device)
        found[key_of["magnitude"]] = m.index_copy(0, rows, tensors[key_of["magnitude"]].to(m))
    return found


def _is_at_work(state: AdapterState, name: str) -> bool:
    return state.active == name and not state.disabled


def _replaced_tensors(model: nn.Module, state: AdapterState, name: str) -> dict[str, Tensor]:
    """The parameters of the base that the adapter replaces, live while it is at work, else as it left them."""
    adapted = {path for path, _ in adapted_layers(model, name)}
    at_work = _is_at_work(state, name)
    tensors = {}
    for key, kept in state.replaced.get(name, {}).items():
        path, _, leaf = key.rpartition(".")
        value = base_parameter(model, key).detach() if at_work else kept
        tensors[f"{PREFIX}{path}{'.base_layer' if path in adapted else ''}.{leaf}"] = value
    return tensors


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read and checked against a model: its configuration, what it adapts, and its tensors."""

    config: LoraConfig
    planned: list[AdaptedModule]
    tensors: dict[str, Tensor]


def read_adapter(model: nn.Module, folder: str | Path, name: str = DEFAULT_NAME) -> AdapterFile:
    """Read a PEFT folder for ``model``, which may lie on the meta device and does not change.

    Raises AdapterError: RW409 files that cannot be read, RW410 a configuration that cannot be honoured, RW411 with
    every tensor that does not fit this model, RW412 values that are not finite, and those of ``add_adapter``.
    """
    folder = Path(folder)
    config, header = read_folder(folder)
    planned = plan_adapter(model, config, name, is_foreign=True)
    _check_fit(model, config, planned, {key: info.shape for key, info in header.tensors.items()}, folder)
    _check_dtypes({key: info.dtype for key, info in header.tensors.items()}, folder)
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    _check_finite(tensors, folder)
    return AdapterFile(config, planned, tensors)


def read_folder(folder: Path) -> tuple[LoraConfig, WeightsHeader]:
    """What an adapter folder says before a model is there to hold it against. Raises AdapterError (RW409, RW410)."""
    document = read_config(folder)
    refuse_pickles(folder, error=AdapterError, code="RW409")
    header = read_header(folder / WEIGHTS_FILE, error=AdapterError, code="RW409")
    return _with_parts(from_peft(document, folder / CONFIG_FILE), header.metadata), header


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str = DEFAULT_NAME, trainable: bool = True
) -> AdapterReport:
    """Lay the adapter of a PEFT folder over the model, in place, and make it the active one.

    The base is frozen; the adapter trains unless ``trainable`` is False. Nothing changes when it raises, which is
    for the reasons of ``read_adapter``.
    """
    file = read_adapter(model, folder, name)
    attach(model, file.config, file.planned, name, trainable=trainable)
    try:
        load_tensors(model, file.tensors, name)
    except BaseException:
        remove_adapter(model, name)
        raise
    return report(model, name)


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], name: str | None = None) -> None:
    """Copy tensors, keyed and shaped as in PEFT's file, into an adapter that is already in place."""
    state, name = state_and_name(model, name)
    layers = {PREFIX + path: layer for path, layer in adapted_layers(model, name)}
    for key, parameter in adapter_parameters(model, name).items():
        layer = layers.get(key.partition(".lora_")[0])
        if parameter.dim() == 3 and ".lora_" in key:
            from_peft = from_peft_A if "lora_A" in key else from_peft_B
            parameter.copy_(from_peft(tensors[key], parameter.shape[0]))
            continue
        parameter.copy_(tensors[key] if layer is None else _compact(key, tensors[key], layer, name))
    for path, copy in trained_copies(model, name):
        for key, buffer in copy.adapters[name].named_buffers():
            if f"{PREFIX}{path}.{key}" in tensors:
                buffer.copy_(tensors[f"{PREFIX}{path}.{key}"])
    _load_end_weights(model, tensors, state, name)


def _load_end_weights(model: nn.Module, tensors: Mapping[str, Tensor], state: AdapterState, name: str) -> None:
    """An embedding or head that came along with the adapter stands in for the base's while the adapter is at work."""
    trained_whole = {f"{PREFIX}{path}.weight" for path, _ in trained_copies(model, name)}
    at_work = _is_at_work(state, name)
    for key, weight in end_weights(model).items():
        if key not in tensors or key in trained_whole or torch.equal(tensors[key].to(weight), weight):
            continue
        plain = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if at_work:
            disable_adapter(model)
        replace_parameter(model, state, name, plain, tensors[key])
        if at_work:
            enable_adapter(model)


def end_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's embedding and output head under the keys by which PEFT saves them beside an adapter on them."""
    finders: list[Any] = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    ends = [end for find in finders if find is not None and (end := find()) is not None]
    inner = [inner_module(end) if isinstance(end, AdaptedLayer | TrainedCopy) else end for end in ends]
    paths = [path for path, module in base_modules(model) if any(module is end for end in inner)]
    modules = dict(base_modules(model))
    return {f"{PREFIX}{path}.{way}weight": modules[path].weight for path in paths for way in ("", "base_layer.")}  # type: ignore[misc]


def _tensor_keys(path: str, base: nn.Module, magnitude: bool) -> dict[str, str]:
    """{key in PEFT's file: attribute of the adapter}."""
    start = f"{PREFIX}{path}."
    if isinstance(base, nn.Embedding):
        keys = {f"{start}lora_embedding_A": "lora_A", f"{start}lora_embedding_B": "lora_B"}
    else:
        keys = {f"{start}lora_A.weight": "lora_A", f"{start}lora_B.weight": "lora_B"}
    return keys | ({f"{start}lora_magnitude_vector": "magnitude"} if magnitude else {})


def _stack_parameters(path: str, stacks: Mapping[str, StackLora]) -> dict[str, nn.Parameter]:
    starts = peft_keys(f"{PREFIX}{path}", list(stacks))
    found = {f"{starts[leaf]}lora_A.weight": lora.lora_A for leaf, lora in stacks.items()}
    return found | {f"{starts[leaf]}lora_B.weight": lora.lora_B for leaf, lora in stacks.items()}


def _compact(key: str, tensor: Tensor, layer: AdaptedLayer, name: str) -> Tensor:
    adapter: Any = layer.adapters[name]
    if adapter.parts is None or key.endswith("lora_A.weight"):
        return tensor
    if key.endswith("lora_magnitude_vector"):
        return tensor[enabled_rows(adapter.parts, tensor.shape[0])]
    B = from_blocks(tensor, adapter.parts)
    if B is None:
        raise AdapterError(
            "RW411",
            f"{key} is not zero outside the parts {list(adapter.parts)} that its file says are adapted.",
        )
    return B


def _as_one_lora(config: LoraConfig, modules: list[AdaptedModule]) -> LoraConfig:
    """The configuration by which PEFT computes the same: fused projections as one LoRA of rank n r."""
    ranks, alphas, grow = {}, {}, scaled_alpha(config)
    for item in modules:
        if item.parts is not None:
            ranks[item.name] = item.r * sum(item.parts)
            alphas[item.name] = grow(item.lora_alpha, sum(item.parts))
    return (
        dataclasses.replace(
            config,
            rank_pattern={**ranks, **config.rank_pattern},
            alpha_pattern={**alphas, **config.alpha_pattern},
        )
        if ranks
        else config
    )


def _with_parts(config: LoraConfig, metadata: Mapping[str, str]) -> LoraConfig:
    """The inverse of ``_as_one_lora``, by what the file's metadata says. Raises AdapterError (RW409)."""
    if PARTS_KEY not in metadata:
        return config
    try:
        stored = parse_json(metadata[PARTS_KEY])
        return dataclasses.replace(config, **{name: stored[name] for name in PARTS_FIELDS})
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise AdapterError("RW409", f"the metadata {PARTS_KEY} of {WEIGHTS_FILE} cannot be read: {error}.") from None


def _plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in mapping.items()}


def _portable_targets(model: nn.Module, config: LoraConfig, modules: list[AdaptedModule]) -> str | list[str]:
    """ "all-linear" spelled out: the shortest list of endings that names the adapted modules and no others."""
    if config.target_modules != "all-linear":
        return config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    names = [item.name for item in modules if item.experts is None]
    endings = sorted(suffixes(names))
    same = {name for name, _ in base_modules(model) if name and matches(name, endings)} == set(names)
    return endings if same and not config.exclude_modules else names


def _check_fit(
    model: nn.Module,
    config: LoraConfig,
    planned: list[AdaptedModule],
    found: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    wanted = _expected_shapes(model, config, planned)
    problems = [f"{key} is missing" for key in wanted if key not in found]
    ends = {key: tuple(weight.shape) for key, weight in end_weights(model).items() if key in found}
    wanted = {**wanted, **ends}
    problems += [f"{key} has no place in the model" for key in found if key not in wanted]
    problems += [
        f"{key} is {found[key]} and the model needs {shape}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    if problems:
        raise AdapterError(
            "RW411",
            f"the adapter in {folder} was made for another base than this {type(model).__name__}: "
            f"{len(problems)} of its tensors do not fit: {'; '.join(problems)}.",
        )


def _expected_shapes(model: nn.Module, config: LoraConfig, planned: list[AdaptedModule]) -> dict[str, tuple[int, ...]]:
    modules = dict(base_modules(model))
    shapes: dict[str, tuple[int, ...]] = {}
    for item in planned:
        base = modules[item.path]
        if item.kind == "trained whole":
            shapes |= {f"{PREFIX}{item.name}.{key}": tuple(value.shape) for key, value in base.state_dict().items()}
            continue
        if item.experts is not None:
            shapes |= _stack_shapes(item, stack_keys(base, item, planned))
            continue
        r = item.r * (1 if item.parts is None else sum(item.parts))
        by_attribute = {
            "lora_A": (r, item.in_features),
            "lora_B": (item.out_features, r),
            "magnitude": (item.out_features,),
        }
        keys = _tensor_keys(item.name, base, config.use_dora)
        shapes |= {key: by_attribute[attribute] for key, attribute in keys.items()}
    adapted = {item.name for item in planned if item.kind != "trained whole"}
    return shapes | _expected_biases(modules, config, adapted)


def stack_keys(experts: nn.Module, item: AdaptedModule, planned: list[AdaptedModule]) -> dict[str, str]:
    """{key in PEFT's file: lora_A or lora_B} of a stack, beside those of the same module that are planned too."""
    beside = [other.leaf for other in planned if other.experts is not None and other.path == item.path]
    start = peft_keys(f"{PREFIX}{item.path}", ordered_stacks(experts, beside))[item.leaf]
    return {f"{start}lora_A.weight": "lora_A", f"{start}lora_B.weight": "lora_B"}


def _stack_shapes(item: AdaptedModule, keys: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    assert item.experts is not None, "a stack"
    ranks = item.experts * item.r
    by_attribute = {"lora_A": (ranks, item.in_features), "lora_B": (item.out_features, ranks)}
    return {key: by_attribute[attribute] for key, attribute in keys.items()}


def _expected_biases(
    modules: Mapping[str, nn.Module], config: LoraConfig, adapted: set[str]
) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path, module in modules.items():
        bias = module._parameters.get("bias")
        if bias is not None and (config.bias == "all" or (config.bias == "lora_only" and path in adapted)):
            inner = ".base_layer" if path in adapted else ""
            shapes[f"{PREFIX}{path}{inner}.bias"] = tuple(bias.shape)
    return shapes


def _check_dtypes(dtypes: Mapping[str, str], folder: Path) -> None:
    odd = [f"{key} ({dtype})" for key, dtype in dtypes.items() if dtype not in ("F32", "F16", "BF16", "F64")]
    if odd:
        raise AdapterError(
            "RW411", f"the adapter in {folder} holds tensors that are no floating-point weights: {', '.join(odd)}."
        )


def _check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise AdapterError("RW412", f"the adapter in {folder} holds NaN or infinity in {', '.join(broken)}.")
