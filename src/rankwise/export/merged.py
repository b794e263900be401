"""Merge an adapter into its base model on disk, tensor by tensor: memory for one layer, whatever the model's size.

W' = W + s B A, or DoRA's g * (W + s B A), by ``adapters.low_rank.merged_weight``. The output has the base's files,
names and dtypes; transformers reads it like any model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rankwise.adapters import load_adapter, merge_adapter
from rankwise.adapters.base_layer import is_conv1d
from rankwise.adapters.checkpoint import PREFIX, AdapterFile, read_adapter
from rankwise.adapters.fused import enabled_rows
from rankwise.adapters.inject import AdaptedModule
from rankwise.adapters.low_rank import merged_weight
from rankwise.adapters.peft_config import read_config
from rankwise.errors import AdapterError, ModelError, RunError
from rankwise.export.safetensors_writer import bytes_of, write_safetensors
from rankwise.export.shards import INDEX_FILE, ShardedWeights
from rankwise.models import fetch_model, load_model, load_skeleton, resolve_model
from rankwise.records import RUN_FILE, load_record, write_json

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
NOT_COPIED = ("adapter_config.json", "run.json", INDEX_FILE, "trainer_state.json")


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What was written: layers merged, and whether tensor by tensor or through the whole model in memory."""

    base_model: str
    merged_modules: int
    streamed: bool


def merge_to_folder(
    adapter: Path, output: Path, *, model: str | None = None, onto: str = "original", trust_remote_code: bool = False
) -> MergeReport:
    """Write the base with the adapter folded in to ``output``, which appears whole or not at all.

    ``model`` is the base, by default the one that the adapter names. Raises AdapterError when the adapter does not fit
    it, ModelError when it cannot be read, RunError (RW532) when ``output`` holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError("RW532", f"{output} is not empty; give a new folder, nothing is overwritten.")
    base = model or base_model_of(adapter)
    source = resolve_model(base)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        # A GGUF's tensors have other names and packings; it goes through memory as an ordinary model.
        if source.is_gguf:
            count = _merge_in_memory(base, adapter, partial)
        else:
            count = _merge_streamed(base, adapter, partial, trust_remote_code)
        _copy_tokenizer(adapter, partial)
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return MergeReport(base, count, streamed=not source.is_gguf)


def base_model_of(adapter: Path) -> str:
    """The base model that a run folder or a PEFT folder names. Raises AdapterError (RW413) when it names none."""
    if (adapter / RUN_FILE).is_file():
        named = load_record(adapter).settings.get("model")
    else:
        named = read_config(adapter).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise AdapterError("RW413", f"the adapter in {adapter} does not name its base model; give --model.")
    return named


def _merge_in_memory(base: str, adapter: Path, output: Path) -> int:
    model, tokenizer = load_model(base, device="cpu")
    report = load_adapter(model, adapter)
    merge_adapter(model, reversible=False)
    model.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    return len(report.modules)


def _merge_streamed(base: str, adapter: Path, output: Path, trust_remote_code: bool) -> int:
    source = fetch_model(base, trust_remote_code=trust_remote_code)
    assert source.path is not None, "a fetched model lies in a folder"
    folder = source.path
    skeleton = load_skeleton(source, trust_remote_code=trust_remote_code)
    if getattr(skeleton.config, "quantization_config", None) is not None:
        raise ModelError(
            "RW309", f"{folder} holds quantized weights, and merging needs the original ones; give them with --model."
        )
    weights = ShardedWeights(folder)
    file = read_adapter(skeleton, adapter)
    names = _names_in_files(skeleton, weights)
    changes, extra = _changes(skeleton, file, names, weights)
    _copy_files(folder, output)
    _write_config(output, untied=bool(extra))
    _write_weights(weights, changes, extra, output)
    return len(file.planned)


def _names_in_files(skeleton: nn.Module, weights: ShardedWeights) -> dict[str, str]:
    """{parameter of the model: its name in the files}; some families leave the base model's prefix out on disk."""
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    names = {}
    for parameter in skeleton.state_dict():
        for name in (parameter, parameter.removeprefix(prefix)):
            if name in weights:
                names[parameter] = name
                break
    return names


Change = Callable[[Tensor], Tensor]


def _changes(
    skeleton: nn.Module, file: AdapterFile, names: Mapping[str, str], weights: ShardedWeights
) -> tuple[dict[str, Change], dict[str, tuple[str, Change]]]:
    """What becomes of which tensor in the files, and tensors that are new there: {name: (made from, by)}."""
    wanted: dict[str, Change] = {}
    for item in file.planned:
        if item.kind == "trained whole":
            start = f"{PREFIX}{item.name}."
            for key in [key for key in file.tensors if key.startswith(start)]:
                wanted[key.removeprefix(PREFIX)] = _replaced_by(file.tensors[key])
        else:
            wanted[f"{item.name}.weight"] = _merged_with(skeleton.get_submodule(item.name), item, file)
    for key, bias in file.tensors.items():
        if key.endswith(".bias"):
            wanted[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = _replaced_by(bias)
    tied = _tied_pair(skeleton)
    extra: dict[str, tuple[str, Change]] = {}
    if tied is not None and any(parameter in wanted for parameter in tied):
        head, embedding = tied
        extra[head] = (names[embedding], wanted.pop(head, lambda tensor: tensor))
    missing = [parameter for parameter in wanted if parameter not in names]
    if missing:
        raise ModelError("RW308", f"{weights.folder} holds no tensor for {', '.join(missing)}; give the whole model.")
    return {names[parameter]: change for parameter, change in wanted.items()}, extra


def _merged_with(base: nn.Module, item: AdaptedModule, file: AdapterFile) -> Change:
    start = f"{PREFIX}{item.name}.lora_"
    embedding = isinstance(base, nn.Embedding)
    A, B = (file.tensors[f"{start}embedding_{x}" if embedding else f"{start}{x}.weight"] for x in "AB")
    m = file.tensors.get(f"{start}magnitude_vector")
    s = file.config.scaling(item.r, item.lora_alpha)
    rows = None if item.parts is None else enabled_rows(item.parts, item.out_features)
    transposed = embedding or is_conv1d(base)

    def change(stored: Tensor) -> Tensor:
        merged = merged_weight(stored.T if transposed else stored, A, B, s, m, rows)
        return merged.T if transposed else merged

    return change


def _replaced_by(value: Tensor) -> Change:
    return lambda stored: value.to(stored.dtype)


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
        return change(weights.tensor(origin))

    return make


def _write_index(weights: ShardedWeights, extra: Mapping[str, tuple[str, Change]], last: str, output: Path) -> None:
    home = {key: file for file, tensors in weights.files.items() for key in tensors} | dict.fromkeys(extra, last)
    infos = [weights.info(key) for key in weights.names()] + [weights.info(origin) for origin, _ in extra.values()]
    total = bytes_of((info.dtype, info.shape) for info in infos)
    write_json(output / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": home})


def _copy_files(folder: Path, output: Path) -> None:
    for pattern in COPIED:
        for path in folder.glob(pattern):
            if path.name not in NOT_COPIED:
                shutil.copyfile(path, output / path.name)


def _copy_tokenizer(adapter: Path, output: Path) -> None:
    """The run's own tokenizer files win over the base's: a chat template given at training belongs to the result."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*"):
        for path in adapter.glob(pattern):
            shutil.copyfile(path, output / path.name)


def _write_config(output: Path, *, untied: bool) -> None:
    if untied:
        path = output / "config.json"
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "tie_word_embeddings": False})
