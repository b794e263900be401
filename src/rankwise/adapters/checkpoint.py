"""Read adapter folders in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Shapes in the file: lora_A (r, in), lora_B (out, r), lora_magnitude_vector (out,), lora_embedding_A (r, vocabulary),
lora_embedding_B (dim, r); of E stacked experts lora_A (E r, in) and lora_B (out, r E), see ``adapters.experts``. A
partly adapted fused projection is one LoRA of rank n r (see ``enable_lora``); the metadata name the adapted parts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import is_quantized
from rankwise.adapters.experts import from_peft_A, from_peft_B, ordered_stacks, peft_keys
from rankwise.adapters.folder import WEIGHTS_FILE, read_config, read_folder
from rankwise.adapters.inject import attach, plan_adapter
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.lora import KEY as TOKENS
from rankwise.adapters.lora import KINDS, TokenRows
from rankwise.adapters.low_rank import enabled_rows, from_blocks
from rankwise.adapters.saving import PREFIX, adapter_parameters, is_at_work, tensor_keys
from rankwise.adapters.select import matches
from rankwise.adapters.state import (
    DEFAULT_NAME,
    AdaptedModule,
    AdapterReport,
    AdapterState,
    adapted_layers,
    base_modules,
    inner_module,
    model_end,
    replace_parameter,
    report,
    state_and_name,
    tied_head,
    trained_copies,
    wrappers,
)
from rankwise.adapters.switch import disable_adapter, enable_adapter, remove_adapter
from rankwise.compat.torch import own_parameters
from rankwise.compat.transformers import heads_of_labels
from rankwise.errors import AdapterError, warn
from rankwise.lora_config import LoraConfig

# Tensors of the embedding or the head that PEFT stores under the names of its own modules too.
COPIES = re.compile(r"\.(modules_to_save|original_module)\.|\.lora_magnitude_vector\.weight$")
BELONGS_ON_FOUR_BITS = "so it corrects the rounding of a 4-bit base, which dense weights do not have"


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read and checked against a model: its configuration, the adapted modules, and its tensors."""

    config: LoraConfig
    planned: list[AdaptedModule]
    tensors: dict[str, Tensor]


def read_adapter(model: nn.Module, folder: str | Path, name: str = DEFAULT_NAME) -> AdapterFile:
    """Read and check a PEFT folder for ``model``, which may be on the meta device.

    The model does not change, except that embedding and head get the adapter's number of tokens. Raises AdapterError:
    RW409 for files that cannot be read, RW410 for an unsupported configuration, RW411 with every tensor that does not
    fit this model, RW412 for values that are not finite, and those of ``add_adapter``.
    """
    folder = Path(folder)
    config, header = read_folder(folder)
    found = {_our_name(key): info.shape for key, info in header.tensors.items()}
    if heads_of_labels(model) and config.modules_to_save:
        # PEFT names the usual heads, whichever of them the model has.
        there = [name for name in config.modules_to_save if any(path.endswith(name) for path, _ in base_modules(model))]
        config = dataclasses.replace(config, modules_to_save=there)
    if read_config(folder).get("ensure_weight_tying"):
        config = _with_tied_head(model, config, found)
    _resize(model, config, _stored_tokens(model, found))
    planned = plan_adapter(model, config, name, is_foreign=True)
    wanted = _check_fit(model, config, planned, found, folder)
    stored = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    tensors = {_our_name(key): tensor for key, tensor in stored.items() if _our_name(key) in wanted}
    _check_finite(tensors, folder)
    return AdapterFile(config, planned, tensors)


def _our_name(key: str) -> str:
    """The key under which rankwise knows a tensor: the base of an embedding whose rows train is a base like others."""
    return key.replace(".token_adapter.base_layer.", ".base_layer.")


def _stored_tokens(model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of tokens of the embedding and the head in an adapter's file; None if it does not hold both."""
    ends = {key: weight for key, weight in end_tensors(model).items() if weight.dim() > 1}
    stored = {id(weight): found[key][0] for key, weight in ends.items() if key in found}
    tokens = {*stored.values()}
    return tokens.pop() if len(tokens) == 1 and stored.keys() == {id(weight) for weight in ends.values()} else None


def _resize(model: nn.Module, config: LoraConfig, stored: int | None) -> None:
    """Resize embedding and head for a stored adapter: to the ``stored`` number of tokens, where its file holds both, or
    else for its new tokens, whose rows it holds. Rows of the base are then zero.

    Raises AdapterError: RW410 for a token far beyond both, whose row would take any amount of memory, RW406 if
    another adapter changes the embedding or the head.
    """
    ids = [index for rows in config.token_rows.values() for index in rows]
    embedding, head = model_end(model, "input"), model_end(model, "output")
    before = 0 if embedding is None else embedding.get_parameter("weight").shape[0]
    tokens = stored or max([before, *(index + 1 for index in ids)])
    if embedding is None or tokens == before:
        return
    if stored is None and tokens > 2 * before + len(ids):
        raise AdapterError(
            "RW410",
            f"trainable_token_indices names the token {tokens - 1:,}, and the embedding has {before:,} rows; give the "
            "base model on which the adapter was trained.",
        )
    replaced = getattr(model, "rankwise_adapters", AdapterState()).base_values
    if replaced or any(inner_module(module) in (embedding, head) for _, module in wrappers(model)):
        raise AdapterError(
            "RW406",
            f"the adapter needs {tokens:,} tokens, the model has {before:,}, and another adapter changes its "
            "embedding, head or biases; load this one first, or into a model of its own.",
        )
    resize: Callable[..., nn.Module] = model.resize_token_embeddings  # type: ignore[assignment]
    resize(tokens, mean_resizing=False)
    for end in (model_end(model, "input"), model_end(model, "output")):
        for value in () if end is None else own_parameters(end).values():
            if value is not None:
                value.data[before:] = 0


def _with_tied_head(model: nn.Module, config: LoraConfig, found: Collection[str]) -> LoraConfig:
    """The configuration with the head, which PEFT's ``ensure_weight_tying`` adapts as the embedding without naming it;
    the file holds a pair for each.
    """
    head, wanted = model_end(model, "output"), config.target_modules or ()
    name = next((name for name, module in base_modules(model) if module is head), "")
    if f"{PREFIX}{name}.lora_A.weight" not in found or matches(name, wanted):
        return config
    both = f"(?:{wanted})|{re.escape(name)}" if isinstance(wanted, str) else [*wanted, name]
    return dataclasses.replace(config, target_modules=both)


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = DEFAULT_NAME,
    trainable: bool = True,
) -> AdapterReport:
    """Add the adapter of a PEFT folder to the model in place, and make it the active one. The base is frozen.

    Args:
        model: A model that the adapter fits.
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: The adapter's name among those of the model.
        trainable: Whether the adapter trains.

    Raises:
        AdapterError: RW409 to RW412 for a folder that cannot be read or does not fit, and those of ``add_adapter``. The
            model is then unchanged, except that embedding and head may have been resized for the adapter's tokens.

    Warns (RW433) of LoftQ's adapter over a base that is not 4-bit.
    """
    file = read_adapter(model, folder, name)
    modules = dict(base_modules(model))
    if file.config.init.kind == "loftq" and not any(is_quantized(modules[item.path]) for item in file.planned):
        warn("RW433", f"the adapter in {folder} started by loftq, {BELONGS_ON_FOUR_BITS}; load the base in 4 bits.")
    attach(model, file.config, file.planned, name, trainable=trainable)
    try:
        load_tensors(model, file.tensors, name)
    except BaseException:
        remove_adapter(model, name)
        raise
    return report(model, name)


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], name: str | None = None) -> None:
    """Copy tensors, with the keys and shapes of PEFT's file, into an adapter of the model."""
    state, name = state_and_name(model, name)
    if state.configs[name].init.kind == "pissa":
        tensors = {**tensors, **_own_ranks(model, tensors, name)}
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


def _own_ranks(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The trained A and B of PiSSA's [A; A_0] and [B, -B_0]; the stored A_0 and B_0 are copied into the layers.

    Raises AdapterError (RW428) if A_0 and B_0 differ from the pair that was subtracted from this model's weights.
    """
    found: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model, name):
        if isinstance(layer.adapter(name), TokenRows):
            continue
        key_A, key_B, *_ = tensor_keys(path, layer.base_layer)
        (A, A_0), (B, B_0) = tensors[key_A].chunk(2), tensors[key_B].chunk(2, dim=1)
        found |= {key_A: A, key_B: B}
        if (origin := layer.origin) is None:
            continue
        A_0, B_0 = A_0.to(origin.A), -B_0.to(origin.B)
        if not (torch.equal(A_0, origin.A) and torch.equal(B_0, origin.B)):
            # Singular vectors may differ in sign between machines; their product does not.
            now, then = (origin.B.float() @ origin.A.float()), (B_0.float() @ A_0.float())
            if not (now - then).norm() <= 1e-3 * now.norm():
                raise AdapterError(
                    "RW428",
                    f"the stored adapter started from other singular vectors of {path} than this model's; continue "
                    "with the same base, init and seed.",
                )
            origin.A.copy_(A_0)
            origin.B.copy_(B_0)
    return found


def _load_end_weights(model: nn.Module, tensors: Mapping[str, Tensor], state: AdapterState, name: str) -> None:
    """Let an embedding or a head from the adapter's folder replace the base's while the adapter is active."""
    trained_whole = tuple(f"{PREFIX}{path}." for path, _ in trained_copies(model, name))
    at_work = is_at_work(state, name)
    for key, weight in end_tensors(model).items():
        if key not in tensors or key.startswith(trained_whole) or torch.equal(tensors[key].to(weight), weight):
            continue
        plain = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if at_work:
            disable_adapter(model)
        replace_parameter(model, state, name, plain, tensors[key])
        if at_work:
            enable_adapter(model)


def end_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{key: weight or bias} of the base's embedding and output head, under the keys with which PEFT saves them."""
    ends = model_end(model, "input"), model_end(model, "output")
    paths = {path: module for path, module in base_modules(model) if any(module is end for end in ends)}
    return {
        f"{PREFIX}{path}.{way}{leaf}": value
        for path, module in paths.items()
        for leaf in ("weight", "bias")
        if isinstance(value := getattr(module, leaf, None), Tensor)
        for way in ("", "base_layer.")
    }


def _compact(key: str, tensor: Tensor, layer: AdaptedLayer, name: str) -> Tensor:
    adapter = layer.adapter(name)
    if adapter.parts is None or key.endswith("lora_A.weight"):
        return tensor
    if key.endswith("lora_magnitude_vector"):
        return tensor[enabled_rows(adapter.parts, tensor.shape[0])]
    B = from_blocks(tensor, adapter.parts)
    if B is None:
        raise AdapterError(
            "RW411",
            f"{key} is not zero outside the adapted parts {list(adapter.parts)} that its file names; save it again.",
        )
    return B


def _check_fit(
    model: nn.Module,
    config: LoraConfig,
    planned: list[AdaptedModule],
    found: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> Collection[str]:
    """The keys of the tensors to read. Raises AdapterError (RW411)."""
    wanted = _expected_shapes(model, config, planned)
    problems = [f"{key} is missing" for key in wanted if key not in found]
    ends = {key: tuple(value.shape) for key, value in end_tensors(model).items()}
    wanted |= {key: shape for key, shape in ends.items() if key in found}
    unread = _not_read(model, found)
    problems += [f"{key} has no place in the model" for key in found if key not in wanted and key not in unread]
    wrong = [key for key, shape in wanted.items() if key in found and found[key] != shape]
    problems += [f"{key} is {found[key]} and the model needs {wanted[key]}" for key in wrong]
    if problems:
        of_ends = {key.rpartition(".")[0] for key in ends}
        trained_on = read_config(folder).get("base_model_name_or_path") or "not named"
        resized = any(key.startswith(f"{end}.") for key in wrong for end in of_ends)
        raise AdapterError(
            "RW411",
            f"the adapter in {folder} was made for a base ({trained_on}) other than this {type(model).__name__}: "
            f"{len(problems)} of its tensors do not fit: {'; '.join(problems)}."
            + " If tokens were added to the base, give the base with its embedding and head resized."
            * resized,
        )
    return wanted.keys()


def _not_read(model: nn.Module, found: Collection[str]) -> set[str]:
    """Keys that need no place: what PEFT's ``save_embedding_layers`` stores twice, and buffers that are computed."""
    state = model.state_dict()
    unread = {key for key in found if COPIES.search(key)} | {f"{PREFIX}{tied_head(model)}.{TOKENS}"}
    for path, module in base_modules(model):
        buffers = (f"{path}.{name}" for name, _ in module.named_buffers(recurse=False))
        unread |= {f"{PREFIX}{name}" for name in buffers if name not in state}
    return unread


def _expected_shapes(model: nn.Module, config: LoraConfig, planned: list[AdaptedModule]) -> dict[str, tuple[int, ...]]:
    modules = dict(base_modules(model))
    shapes: dict[str, tuple[int, ...]] = {}
    for item in planned:
        base = modules[item.path]
        if item.kind == "new tokens":
            shapes[f"{PREFIX}{item.name}.{TOKENS}"] = (len(item.tokens), base.get_parameter("weight").shape[1])
            continue
        if item.kind == "trained whole":
            shapes |= {f"{PREFIX}{item.name}.{key}": tuple(value.shape) for key, value in base.state_dict().items()}
            continue
        r = item.r * (item.experts or (1 if item.parts is None else sum(item.parts)))
        vectors, stacked = KINDS[config.kind].vectors, item.experts is not None
        by_attribute = {"lora_A": (r, item.in_features), "lora_B": (item.out_features, r)}
        keys = stack_keys(base, item, planned) if stacked else tensor_keys(item.name, base, vectors)
        shapes |= {key: by_attribute.get(attribute, (item.out_features,)) for key, attribute in keys.items()}
    adapted = {item.name for item in planned if item.is_pair}
    return shapes | _expected_biases(modules, config, adapted)


def stack_keys(experts: nn.Module, item: AdaptedModule, planned: list[AdaptedModule]) -> dict[str, str]:
    """{key in PEFT's file: lora_A or lora_B} of a stack. ``planned`` has the other stacks of the same module."""
    beside = [other.leaf for other in planned if other.experts is not None and other.path == item.path]
    start = peft_keys(f"{PREFIX}{item.path}", ordered_stacks(experts, beside))[item.leaf]
    return {f"{start}lora_A.weight": "lora_A", f"{start}lora_B.weight": "lora_B"}


def _expected_biases(
    modules: Mapping[str, nn.Module], config: LoraConfig, adapted: set[str]
) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path, module in modules.items():
        bias = own_parameters(module).get("bias")
        if bias is not None and (config.bias == "all" or (config.bias == "lora_only" and path in adapted)):
            inner = ".base_layer" if path in adapted else ""
            shapes[f"{PREFIX}{path}{inner}.bias"] = tuple(bias.shape)
    return shapes


def _check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise AdapterError("RW412", f"the adapter in {folder} holds NaN or infinity in {', '.join(broken)}.")
