"""``model.gguf``: a base with the adapter merged in, as llama.cpp and Ollama read whole models.

Where the base is a GGUF its header and tokenizer are copied, and so are the tensors that the adapter leaves alone. Of
a base in safetensors a merged folder is converted. One tensor is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.adapters.checkpoint import AdapterFile
from rankwise.adapters.experts import merged_stack
from rankwise.adapters.saving import PREFIX
from rankwise.adapters.state import base_modules
from rankwise.disk import naming_by_numpy
from rankwise.errors import ModelError, some_of
from rankwise.export.gguf_adapter import EMBEDDING, HEAD, check_base
from rankwise.export.gguf_header import write_header
from rankwise.export.gguf_names import GgufNames, Part, is_norm, weights_of
from rankwise.export.merged import check_merged
from rankwise.export.pairs import Change, merging, replaced_by, scaled_pairs, transposed
from rankwise.export.shards import ShardedWeights
from rankwise.models.gguf_file import read_gguf_header
from rankwise.quantization.linear import is_conv1d

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader, GGUFWriter, ReaderTensor
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_FILE = "model.gguf"
DEFAULT_TYPE = "f16"


class Planned(NamedTuple):
    """A tensor of the file to write: shape in numpy's order, ggml's type, and when it is its turn its values, or an
    array that is copied."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    make: Callable[[], Tensor | np.ndarray]


def merged_changes(model: nn.Module, file: AdapterFile, names: GgufNames) -> dict[str, Change]:
    """{tensor of the GGUF: what becomes of it, in float32}, of everything that the adapter trains."""
    modules, pairs = dict(base_modules(model)), scaled_pairs(model, file)
    changes: dict[str, Change] = {}
    for item in file.planned:
        if item.experts is not None:
            pair, s = pairs[item.name]
            for part in names.of(item.name):
                B = part.of(pair.B * s)
                changes[part.name] = partial(merged_stack, A=pair.A, B=B, scaling=1.0, transposed=False)
        elif item.is_pair:
            change = merging(item, file, pairs[item.name], partial(names.rows, item.name))
            is_embedding = isinstance(modules[item.name], nn.Embedding)
            changes[names.of(item.name)[0].name] = transposed(change) if is_embedding else change
    for key, value in file.tensors.items():
        if ".lora_" not in key:
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            module = modules[name.rpartition(".")[0]]
            changes[names.of(name)[0].name] = replaced_by(stored(names, name, value, is_conv1d(module)))
    return changes


def stored(names: GgufNames, name: str, W: Tensor, transposed: bool) -> Tensor:
    """A tensor of transformers' as llama.cpp has it."""
    W = W.float()
    if names.architecture.startswith("gemma") and is_norm(name):
        W = W + 1
    return names.rows(name, W.T if transposed and W.dim() == 2 else W)


def write_merged_gguf(
    path: Path, base: Path, model: PreTrainedModel, file: AdapterFile, kind: str | None, template: str | None
) -> None:
    """The GGUF ``base`` with the adapter merged in: changed tensors in ``kind`` (default F16), and with a ``kind`` also
    those that are not quantized yet; all others are copied. ``template`` replaces the chat template.

    Raises ModelError (RW310, RW741, RW743).
    """
    names = GgufNames(model.config)
    header = check_base(base, names, {})
    changes = merged_changes(model, file, names)
    tied = HEAD not in header.tensors
    if tied and (EMBEDDING in changes or HEAD in changes):
        # Raises for Gemma 2, which llama.cpp reads without a head of its own.
        names.of("lm_head")
        changes.setdefault(HEAD, lambda W: W)
    missing = [name for name in changes if name not in header.tensors and name != HEAD]
    if missing:
        raise ModelError("RW743", f"{base} is another model than the adapter's base: it has no {some_of(missing)}.")
    _rewrite(path, base, changes, kind, template)


def requantize(path: Path, base: Path, kind: str | None) -> None:
    """A GGUF with its own weights in ``kind``, those that are not quantized yet."""
    read_gguf_header(base)
    _rewrite(path, base, {}, kind, None)


def _rewrite(path: Path, base: Path, changes: Mapping[str, Change], kind: str | None, template: str | None) -> None:
    """Copy the header of ``base`` and its tensors, but for the ``changes``."""
    import gguf

    reader = gguf.GGUFReader(base)
    writer = gguf.GGUFWriter(path, str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents()))
    # Its key is copied with the others.
    writer.data_alignment = reader.alignment
    own = {gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE}
    if template is not None:
        own.add(gguf.Keys.Tokenizer.CHAT_TEMPLATE)
        writer.add_chat_template(template)
    writer.add_file_type(_file_type(kind))
    for field in reader.fields.values():
        if field.name in own or field.name.startswith("GGUF."):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    _write(writer, path, _planned(reader, changes, kind))


def _file_type(kind: str | None) -> int:
    import gguf

    kind = kind or DEFAULT_TYPE
    return int(gguf.LlamaFileType.ALL_F32 if kind == "f32" else gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])


def _planned(reader: GGUFReader, changes: Mapping[str, Change], kind: str | None) -> Iterator[Planned]:
    import gguf

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sources = {name: tensors[name if name in tensors else EMBEDDING] for name in {**tensors, **changes}}
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    for name, source in sources.items():
        shape = tuple(int(length) for length in reversed(source.shape))
        change = changes.get(name)
        if change is None and (kind is None or source.tensor_type not in plain):
            yield Planned(name, shape, source.tensor_type, partial(getattr, source, "data"))
        else:
            wanted = _kind_for(name, shape, kind or DEFAULT_TYPE, source.tensor_type)
            yield Planned(name, shape, wanted, partial(_changed, name, source, change))


def _changed(name: str, source: ReaderTensor, change: Change | None) -> Tensor:
    import gguf

    shape = tuple(int(length) for length in reversed(source.shape))
    W = torch.from_numpy(np.array(gguf.dequantize(source.data, source.tensor_type))).reshape(shape)
    if change is not None:
        W = change(W)
        check_merged(name, W)
    return W


def _kind_for(name: str, shape: tuple[int, ...], wanted: str, own: Kind | None = None) -> Kind:
    """F32 for vectors and routers, as llama.cpp wants them; F16 where rows are not whole blocks."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(shape) < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        return kinds.F32 if own is None else own
    kind = kinds[wanted.upper()]
    return kinds.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def write_folder_gguf(path: Path, folder: Path, config: PreTrainedConfig, kind: str | None) -> None:
    """A merged model folder of transformers' as a GGUF. Raises ModelError: RW740, RW741, RW744 to RW746."""
    import gguf

    names, weights = GgufNames(config), ShardedWeights(folder)
    transposed = str(config.model_type) == "gpt2"
    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_file_type(_file_type(kind))
    extra = write_header(writer, names, folder)
    planned = []
    for name, files in _stacked(list(weights_of(weights.names()))).items():
        shape = weights.info(files[0]).shape
        turned = transposed and ".h." in name and len(shape) == 2
        shape = shape[::-1] if turned else shape
        shape = (len(files), *shape) if len(files) > 1 else shape
        for part in names.of(name):
            found = shape if part.half is None else (shape[0], shape[1] // 2, *shape[2:])
            make = partial(_converted, names, weights, (name, files, part, turned))
            planned.append(Planned(part.name, found, _kind_for(part.name, found, kind or DEFAULT_TYPE), make))
    for name, value in extra.items():
        planned.append(Planned(name, tuple(value.shape), gguf.GGMLQuantizationType.F32, partial(value.clone)))
    _write(writer, path, iter(planned))


# A matrix of one expert, as files mostly hold them.
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def _stacked(names: list[str]) -> dict[str, list[str]]:
    """{tensor: its names in the files}, more than one where each expert has its own."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        one = EXPERT.fullmatch(name)
        found.setdefault(name if one is None else f"{one[1]}.{one[3]}", {})[0 if one is None else int(one[2])] = name
    return {name: [by_expert[index] for index in sorted(by_expert)] for name, by_expert in found.items()}


def _converted(names: GgufNames, weights: ShardedWeights, what: tuple[str, list[str], Part, bool]) -> Tensor:
    name, files, part, turned = what
    if len(files) > 1:
        return torch.stack([weights.tensor(file).float() for file in files])
    return part.of(stored(names, name, weights.tensor(files[0]), turned))


def _write(writer: GGUFWriter, path: Path, tensors: Iterator[Planned]) -> None:
    import gguf

    planned = list(tensors)
    for item in planned:
        block, block_bytes = gguf.GGML_QUANT_SIZES[item.kind]
        size_bytes = prod(item.shape) // block * block_bytes
        # Any dtype but uint8 leaves the shape as it is.
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), size_bytes, item.kind)
    with naming_by_numpy(path), closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in planned:
            data = item.make()
            if isinstance(data, Tensor):
                data = gguf.quantize(np.ascontiguousarray(data.float().numpy()), item.kind)
            writer.write_tensor_data(data)
