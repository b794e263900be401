"""Merge an adapter into its base model on disk, tensor by tensor: memory for one layer, whatever the model's size.

W' = W + s B A, or DoRA's g * (W + s B A), by ``adapters.low_rank.merged_weight``. The output has the base's files,
names and dtypes; transformers reads it like any model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rankwise.adapters import load_adapter, merge_adapter, peft_config
from rankwise.adapters.base_layer import make_dense
from rankwise.adapters.checkpoint import BELONGS_ON_FOUR_BITS, AdapterFile, end_tensors, read_adapter, read_folder
from rankwise.adapters.experts import merged_stack
from rankwise.adapters.saving import PREFIX
from rankwise.adapters.state import DEFAULT_NAME, adapter_state
from rankwise.adapters.trained_base import (
    base_model_of,
    dtype_of,
    labels_of,
    quantization_of,
    revision_of,
    sha256_of_base,
)
from rankwise.compat.transformers import collected
from rankwise.disk import hold, whole_folder
from rankwise.errors import AdapterError, ModelError, RunError, heard, some_of, warn
from rankwise.export.pairs import Change, merging, replaced_by, scaled_pairs, transposed
from rankwise.export.weights import (
    ConvertedParameters,
    ShardedWeights,
    bytes_of,
    rounding,
    write_safetensors,
)
from rankwise.foreign import Fields
from rankwise.models import ModelSource, fetch_model, load_model, load_skeleton, model_hash, warns_of_other_hub_model
from rankwise.models.folder import INDEX_FILE, read_config
from rankwise.models.source import is_other_hub_model
from rankwise.quantization.config import CONFIGS, FourBitConfig, Nf4Config, rewrite_bitsandbytes_config
from rankwise.quantization.in_place import is_finite
from rankwise.quantization.linear import is_conv1d
from rankwise.quantization.targets import target_names, target_stacks
from rankwise.quantization.transformers_plugin import mark_quantized
from rankwise.records import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
CODE = "*.py"
RECORD_FILE = "merge.json"
NOT_COPIED = ("adapter_config.json", "run.json", INDEX_FILE, "trainer_state.json")


Onto = Literal["original", "quantized"]


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The content of ``merge.json``: the merged modules, the weights they were merged into, and the measured effect of
    each way of merging."""

    adapter: str
    base_model: str
    merged_modules: int
    onto: Onto
    verification: Fields | None


def merge_to_folder(
    adapter: Path,
    output: Path,
    *,
    model: str | None = None,
    onto: Onto = "original",
    trained_on: FourBitConfig | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    verification: Fields | None = None,
) -> MergeReport:
    """Write the base with the adapter merged to ``output``, which appears whole or not at all, with its record.

    ``model`` is the base, by default the one that the adapter names, at the commit on which it was trained. ``onto``:
    "quantized" merges into the dequantized values of the 4-bit layers on which a run trained, "original" into the
    weights before quantization. Of an adapter that was trained for a merged 4-bit file, the weights of its training
    are written: NF4, or dense ones that Q4_0 takes over exactly. ``trained_on`` is the 4-bit format, where the
    adapter's folder has no record of it.

    Raises AdapterError if the adapter does not fit the base (RW414: it was not trained on 4 bits), ModelError if
    the base cannot be read or (RW309) holds no original weights, RunError: RW532 if ``output`` is not empty, RW551
    where it cannot be written, RW582 where another process writes to it. Warns RW417 of another hub model than the
    adapter names, RW415 of other weights than in training.
    """
    with hold(output):
        refuse_to_overwrite(output)
        source = base_source(adapter, model, revision=revision, trust_remote_code=trust_remote_code)
        base = _base(adapter, source, onto, trained_on, trust_remote_code)
        _warn_of_another_base(adapter, source)
        # These go through memory as ordinary models: tensors of other names or formats (GGUF, 4 bits on disk, other
        # libraries' layers), an embedding and head of a different size, a head of labels, which the base's files do not
        # hold, and adapters that round whole layers.
        is_plain = not (source.is_gguf or base.stored or foreign_quantization(source))
        streams = is_plain and source.labels is None and read_folder(adapter)[0].for_merge is None
        if streams:
            skeleton = load_skeleton(source, trust_remote_code=trust_remote_code)
            file = read_adapter(skeleton, adapter)
            streams = not file.has_new_tokens
        with whole_folder(output) as folder:
            count = (
                _merge_streamed(base, skeleton, file, folder) if streams else _merge_in_memory(base, adapter, folder)
            )
            _copy_tokenizer(adapter, folder)
            report = MergeReport(str(adapter), source.name, count, onto, verification)
            write_json(folder / RECORD_FILE, dataclasses.asdict(report))
    return report


def refuse_to_overwrite(output: Path) -> None:
    """Raise RunError (RW532) unless ``output`` is missing or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError("RW532", f"{output} is not empty; give a new folder, nothing is overwritten.")


@dataclasses.dataclass(frozen=True)
class Base:
    """The fetched model to merge into; for a merge onto 4-bit values, their format and the dtype that was quantized."""

    source: ModelSource
    quantization: FourBitConfig | None
    dtype: torch.dtype | None
    # Whether the files hold the 4-bit values, so that nothing is quantized here.
    stored: bool = False
    trust_remote_code: bool = False


def base_source(
    adapter: Path, model: str | None = None, *, revision: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """The base to merge into, its files on this machine: ``model``, or the one the adapter was trained on.

    Raises what ``read_adapter`` raises for an adapter that does not fit, before the weights are fetched.
    """
    if model is None:
        model, revision = base_model_of(adapter), revision or revision_of(adapter)
    source = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    source = dataclasses.replace(source, labels=labels_of(adapter))
    # Merging gives the warnings again.
    with heard(lambda warning: False):
        read_adapter(load_skeleton(source, trust_remote_code=trust_remote_code), adapter)
    return fetch_model(source, trust_remote_code=trust_remote_code)


def stored_quantization(source: ModelSource) -> FourBitConfig | None:
    """The format of a base whose files hold 4-bit weights (bitsandbytes'); None for one with dense weights.

    Raises ModelError (RW309) for weights that are quantized in a different way.
    """
    if (method := foreign_quantization(source)) is not None:
        raise ModelError(
            "RW309",
            f"{source.path} holds weights quantized with {method}, which no adapter merges into; give the original "
            "ones with --model, or merge into the dequantized values with --onto quantized.",
        )
    stored = _stored_format(source)
    return None if stored is None else rewrite_bitsandbytes_config(stored)


def _stored_format(source: ModelSource) -> Any:
    return None if source.is_gguf else read_config(source.place).get("quantization_config")


def foreign_quantization(source: ModelSource) -> str | None:
    """transformers' name of the format of quantized weights that are not bitsandbytes' 4 bits; None for other files."""
    stored = _stored_format(source)
    if stored is None or rewrite_bitsandbytes_config(stored) is not None:
        return None
    return str(stored.get("quant_method") if isinstance(stored, dict) else stored)


def format_of(quant_type: str | None, *, double_quant: bool) -> FourBitConfig | None:
    """The format that a user names, in blocks of 64; None if none is named."""
    return None if quant_type is None else CONFIGS[quant_type](double_quant=double_quant)


def _base(
    adapter: Path, source: ModelSource, onto: Onto, trained_on: FourBitConfig | None, trust_remote_code: bool
) -> Base:
    if onto == "quantized" and foreign_quantization(source) is not None:
        # transformers or its own layers dequantize them.
        return Base(source, None, dtype_of(adapter), trust_remote_code=trust_remote_code)
    stored = stored_quantization(source)
    if read_folder(adapter)[0].for_merge is not None:
        return Base(source, named_format(adapter, trained_on), dtype_of(adapter), stored is not None, trust_remote_code)
    if onto == "original":
        if read_folder(adapter)[0].init.kind == "loftq":
            raise AdapterError(
                "RW433", f"{adapter} started by loftq, {BELONGS_ON_FOUR_BITS}; merge it with --onto quantized."
            )
        if stored is not None:
            raise ModelError(
                "RW309",
                f"{source.path} holds 4-bit weights and not the original ones; give those with --model, or merge into "
                "the dequantized values with --onto quantized.",
            )
        return Base(source, None, None, trust_remote_code=trust_remote_code)
    quantization = None if stored is not None else _trained_on(adapter, trained_on)
    return Base(source, quantization, dtype_of(adapter), stored is not None, trust_remote_code)


def check_trained_base(adapter: Path, source: ModelSource) -> None:
    """Raise RunError (RW738) for a base other than the one trained on, over which there is no trained model."""
    trained, named = sha256_of_base(adapter), peft_config.read_config(adapter).get("base_model_name_or_path")
    if is_other_hub_model(source.name, named) or (trained is not None and trained != model_hash(source)):
        raise RunError(
            "RW738",
            f"nothing can be proven: {source.name} does not hold the weights that {adapter} was trained on; leave "
            "--model out, or export without --verify.",
        )


def _warn_of_another_base(adapter: Path, source: ModelSource) -> None:
    if warns_of_other_hub_model(source.name, adapter, peft_config.read_config(adapter)):
        return
    trained = sha256_of_base(adapter)
    if trained is not None and trained != (found := model_hash(source)):
        warn(
            "RW415",
            f"the adapter in {adapter} was trained on weights with SHA-256 {trained[:12]}..., and those of "
            f"{source.name} have {found[:12]}...; check that this is the base you want to merge into.",
            stacklevel=3,
        )


def named_format(adapter: Path, given: FourBitConfig | None) -> FourBitConfig | None:
    """The 4-bit format that the adapter's folder records, or else ``given``. Raises AdapterError (RW414) if they
    differ.
    """
    recorded = quantization_of(adapter)
    names = [(one.quant_type, one.double_quant) for one in (recorded, given) if one is not None]
    if len(set(names)) > 1:
        scales = ["single-quantized scales", "double-quantized scales"]
        recorded_as, asked = (f"{kind} with {scales[double]}" for kind, double in names)
        raise AdapterError("RW414", f"{adapter} was trained on {recorded_as}, not {asked}; leave --quantization out.")
    return recorded or given


def _trained_on(adapter: Path, given: FourBitConfig | None) -> FourBitConfig:
    quantization = named_format(adapter, given)
    if quantization is None:
        raise AdapterError(
            "RW414",
            f"{adapter} has no record that it belongs on a 4-bit base; merge it with --onto original, or say with "
            "--quantization on which format it trained.",
        )
    return quantization


def _merge_in_memory(base: Base, adapter: Path, output: Path) -> int:
    model, tokenizer = load_model(
        base.source,
        dtype=base.dtype,
        device="cpu",
        quantization=base.quantization,
        trust_remote_code=base.trust_remote_code,
    )
    report = load_adapter(model, adapter)
    is_four_bit = adapter_state(model).configs[DEFAULT_NAME].for_merge == "nf4"
    merge_adapter(model, reversible=False)
    if is_four_bit:
        mark_quantized(model, Nf4Config(double_quant=True))
    elif base.quantization is not None or base.stored:
        model = model.dequantize()
    if foreign_quantization(base.source) is not None:
        make_dense(model)
    for name, parameter in model.named_parameters():
        check_merged(name, parameter.detach())
    model.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    return len(report.modules)


def _merge_streamed(base: Base, skeleton: PreTrainedModel, file: AdapterFile, output: Path) -> int:
    weights = ShardedWeights(base.source.place)
    names = _names_in_files(skeleton, weights)
    wanted, extra = _changes(skeleton, file, names)
    if base.quantization is not None:
        wanted = _after_quantization(skeleton, base, base.quantization, wanted)
    as_stored = {parameter: names[parameter] for parameter in wanted if parameter in names}
    _check_shapes(skeleton, as_stored, weights)
    changes = {name: wanted.pop(parameter) for parameter, name in as_stored.items()}
    changes |= ConvertedParameters(skeleton, weights, wanted | _stack_changes(skeleton, file, base)).changes()
    _copy_files(base.source.place, output, code=base.trust_remote_code)
    _write_config(output, untied=bool(extra))
    _write_weights(weights, changes, extra, output)
    return len(file.planned)


def _names_in_files(skeleton: nn.Module, weights: ShardedWeights) -> dict[str, str]:
    """{parameter of the model: its name in the files}. The names may differ: without the base model's prefix (GPT-2),
    or with other parts (Qwen2.5-VL)."""
    state = skeleton.state_dict()
    found = collected(skeleton, weights.names())
    return {parameter: name for name, parameter, made in found if made is None and parameter in state}


def _stack_changes(skeleton: nn.Module, file: AdapterFile, base: Base) -> dict[str, Change]:
    """{parameter of stacked experts: its change}: rounded if it is 4-bit in training, merged if it is adapted."""
    config, pairs = base.quantization, scaled_pairs(skeleton, file)
    changes = {} if config is None else dict.fromkeys(target_stacks(skeleton, config), rounding(config, base.dtype))
    for item in file.planned:
        if item.experts is not None:
            experts: Any = skeleton.get_submodule(item.path)
            pair, s = pairs[item.name]
            merge = partial(merged_stack, A=pair.A, B=pair.B, scaling=s, transposed=experts.is_transposed)
            changes[item.name] = _after(changes[item.name], merge) if item.name in changes else merge
    return changes


def _changes(
    skeleton: nn.Module, file: AdapterFile, names: Mapping[str, str]
) -> tuple[dict[str, Change], dict[str, tuple[str, Change]]]:
    """({parameter: its change}, {new tensor: (tensor in the files from which it is made, change)})."""
    wanted: dict[str, Change] = {}
    pairs = scaled_pairs(skeleton, file)
    for item in file.planned:
        if item.kind == "trained whole":
            start = f"{PREFIX}{item.name}."
            for key in [key for key in file.tensors if key.startswith(start)]:
                wanted[key.removeprefix(PREFIX)] = replaced_by(file.tensors[key])
        elif item.experts is None:
            module, change = skeleton.get_submodule(item.name), merging(item, file, pairs[item.name])
            is_stored_transposed = isinstance(module, nn.Embedding) or is_conv1d(module)
            wanted[f"{item.name}.weight"] = transposed(change) if is_stored_transposed else change
    for key, bias in file.tensors.items():
        if key.endswith(".bias"):
            wanted[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = replaced_by(bias)
    tied = _tied_pair(skeleton)
    _replace_ends(wanted, skeleton, file, tied)
    extra: dict[str, tuple[str, Change]] = {}
    if tied is not None and any(parameter in wanted for parameter in tied):
        head, embedding = tied
        extra[head] = (names[embedding], wanted.pop(head, lambda tensor: tensor))
    return wanted, extra


def _check_shapes(skeleton: nn.Module, names: Mapping[str, str], weights: ShardedWeights) -> None:
    state = skeleton.state_dict()
    shapes = [(name, weights.info(name).shape, tuple(state[parameter].shape)) for parameter, name in names.items()]
    wrong = [f"{name} is {found}, expected {wanted}" for name, found, wanted in shapes if found != wanted]
    if wrong:
        raise ModelError("RW308", f"the weights of {weights.folder} do not fit its config.json: {some_of(wrong)}.")


def _after_quantization(
    skeleton: nn.Module, base: Base, config: FourBitConfig, wanted: Mapping[str, Change]
) -> dict[str, Change]:
    """``wanted``, preceded by rounding to 4 bits for every layer that is 4-bit in training, adapted or not."""
    result, rounded = dict(wanted), rounding(config, base.dtype)

    def rounded_as_stored(W: Tensor) -> Tensor:
        return rounded(W).to(W.dtype)

    for layer in target_names(skeleton, config):
        parameter, is_stored_transposed = f"{layer[0]}.weight", is_conv1d(skeleton.get_submodule(layer[0]))
        first = transposed(rounded_as_stored) if is_stored_transposed else rounded_as_stored
        result[parameter] = _after(first, wanted.get(parameter))
    return result


def _replace_ends(
    wanted: dict[str, Change], skeleton: nn.Module, file: AdapterFile, tied: tuple[str, str] | None
) -> None:
    """Let an embedding or head that PEFT saved with the adapter replace the base's, before anything is merged."""
    whole = tuple(f"{PREFIX}{item.name}." for item in file.planned if item.kind == "trained whole")
    for key in sorted(file.tensors.keys() & end_tensors(skeleton).keys()):
        if key.startswith(whole):
            continue
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        put = replaced_by(file.tensors[key])
        wanted[name] = _after(put, wanted.get(name))
        if tied is not None and name == tied[1]:
            wanted.setdefault(tied[0], put)


def _after(first: Change, second: Change | None) -> Change:
    return first if second is None else lambda tensor: second(first(tensor))


def _tied_pair(skeleton: nn.Module) -> tuple[str, str] | None:
    """(name of the head's weight, name of the embedding's) where the two are one tensor."""
    tied: Mapping[str, str] = getattr(skeleton, "all_tied_weights_keys", {})
    model: Any = skeleton
    return next(iter(tied.items())) if tied and getattr(model.config, "tie_word_embeddings", False) else None


def _write_weights(
    weights: ShardedWeights, changes: Mapping[str, Change], extra: Mapping[str, tuple[str, Change]], output: Path
) -> None:
    last = list(weights.files)[-1]
    for name, tensors in weights.files.items():
        shapes = {key: (info.dtype, info.shape) for key, info in tensors.items()}
        if name == last:
            shapes |= {key: weights.info(origin)[:2] for key, (origin, _) in extra.items()}
        write_safetensors(output / name, shapes, _maker(weights, changes, extra), {"format": "pt"})
    if len(weights.files) > 1:
        _write_index(weights, extra, last, output)


def _maker(
    weights: ShardedWeights, changes: Mapping[str, Change], extra: Mapping[str, tuple[str, Change]]
) -> Callable[[str], Tensor]:
    def make(name: str) -> Tensor:
        origin, change = extra.get(name) or (name, changes.get(name, lambda tensor: tensor))
        tensor = weights.tensor(origin)
        # Dtypes of fewer than 16 bits cannot be summed, and are not merged.
        if tensor.is_floating_point() and tensor.itemsize > 1 and not is_finite(tensor):
            raise ModelError(
                "RW323", f"the weights of {weights.folder} hold NaN or infinity in {origin}; get them again."
            )
        merged = change(tensor)
        check_merged(name, merged)
        return merged

    return make


def check_merged(name: str, W: Tensor) -> None:
    if W.is_floating_point() and W.itemsize > 1 and not is_finite(W):
        raise AdapterError(
            "RW412",
            f"merging makes NaN or infinity of {name} in {str(W.dtype).removeprefix('torch.')}; the adapter's numbers "
            "or its scale (lora_alpha, r in adapter_config.json) are too large for it.",
        )


def _write_index(weights: ShardedWeights, extra: Mapping[str, tuple[str, Change]], last: str, output: Path) -> None:
    home = {key: file for file, tensors in weights.files.items() for key in tensors} | dict.fromkeys(extra, last)
    infos = [weights.info(key) for key in weights.names()] + [weights.info(origin) for origin, _ in extra.values()]
    total = bytes_of((info.dtype, info.shape) for info in infos)
    write_json(output / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": home})


def _copy_files(folder: Path, output: Path, *, code: bool) -> None:
    """Settings and tokenizer, and the model's own Python code where the caller trusts it."""
    for pattern in (*COPIED, CODE) if code else COPIED:
        for path in folder.glob(pattern):
            if path.name not in NOT_COPIED:
                shutil.copyfile(path, output / path.name)


def _copy_tokenizer(adapter: Path, output: Path) -> None:
    """Copy the run's tokenizer files over the base's, since they hold a chat template given for training."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*"):
        for path in adapter.glob(pattern):
            shutil.copyfile(path, output / path.name)


def _write_config(output: Path, *, untied: bool) -> None:
    path = output / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    changed = {key: value for key, value in stored.items() if key != "quantization_config"}
    if untied:
        changed["tie_word_embeddings"] = False
    if changed != stored:
        write_json(path, changed)
