"""``adapter.gguf``: low-rank pairs in the format of llama.cpp and Ollama, by their names and in their order.

The loader computes W x + (alpha / r) B A x, with r read from each B; alpha = r makes that scale 1. In numpy's order
lora_a is (r, in) and lora_b (out, r), of E experts (E, r, in) and (E, out, r), of an embedding (vocabulary, r) and
(dim, r). Rows of W (out, in) and of B (out, r) are ordered alike (`rankwise.models.gguf_file`).
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from rankwise.adapters.state import base_modules
from rankwise.disk import naming
from rankwise.errors import AdapterError, ModelError, some_of
from rankwise.export.pairs import Pair, Pairs
from rankwise.models.gguf_file import GgufHeader, GgufNames, read_gguf_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ADAPTER_FILE = "adapter.gguf"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Of Gemma 4: llama.cpp loads an adapter's pair for it, and computes without.
IGNORED = "per_layer_model_proj.weight"


def gguf_pairs(model: PreTrainedModel, names: GgufNames, pairs: Pairs) -> dict[str, Pair]:
    """{name in the GGUF: (lora_a, lora_b) in the GGUF's row order}, with the shapes above.

    Raises AdapterError (RW742) for an adapter on a tied head or embedding, and ModelError (RW740) for one on `IGNORED`,
    which llama.cpp would not compute.
    """
    found: dict[str, Pair] = {}
    modules = dict(base_modules(model))
    for name, pair in pairs.items():
        for part in names.of(name):
            B = part.of(pair.B)
            if isinstance(modules.get(name), nn.Embedding):
                found[part.name] = Pair(pair.A.T, B)
            else:
                A = names.columns(name, pair.A)
                found[part.name] = Pair(A, names.rows(name, B) if B.dim() == 2 else B)
    if IGNORED in found:
        raise ModelError(
            "RW740",
            f"llama.cpp computes {IGNORED} without an adapter; leave per_layer_model_projection out of "
            "--target-modules, or write a merged model with --merged.",
        )
    tied = bool(getattr(names.config, "tie_word_embeddings", False))
    if tied and (ends := [name for name in (EMBEDDING, HEAD) if name in found]):
        raise AdapterError(
            "RW742",
            f"the adapter changes {some_of(ends)}, and in this base embedding and head are one tensor, to which "
            "llama.cpp would apply it twice or not at all; write a merged model with --merged.",
        )
    return found


def check_base(base: Path, names: GgufNames, pairs: Pairs) -> GgufHeader:
    """Check the pairs against the GGUF of their base. Raises ModelError: RW310 for a damaged file, RW743 for a
    different architecture or a tensor that is missing or has a different shape."""
    header = read_gguf_header(base)
    found = header.metadata["general.architecture"]
    if found != names.architecture:
        raise ModelError(
            "RW743", f"{base} is of the architecture {found}, and the adapter's base is {names.architecture}."
        )
    problems = []
    for name, pair in pairs.items():
        there = header.tensors[name].shape[:2] if name in header.tensors else None
        # (in, out) of the weight below; an embedding's rows are its vocabulary.
        ends = (pair.B.shape[0], pair.A.shape[0]) if name == EMBEDDING else (pair.A.shape[-1], pair.B.shape[-2])
        if there != ends:
            problems.append(f"{name} is {there} and the adapter's {ends}")
    if problems:
        raise ModelError("RW743", f"{base} is not the adapter's base: {some_of(problems)}.")
    return header


def write_adapter(path: Path, names: GgufNames, pairs: Pairs, base_name: str | None) -> None:
    """``pairs`` as `gguf_pairs` gives them, all of one rank, in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    (r,) = {pair.B.shape[-1] for pair in pairs.values()}
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(r))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if base_name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
    for name, pair in pairs.items():
        for side, tensor in (("a", pair.A), ("b", pair.B)):
            writer.add_tensor(f"{name}.lora_{side}", np.ascontiguousarray(tensor.float().numpy()))
    with naming(path), closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


MODELFILE = "Modelfile"


def modelfile(model: Path, *, named: str, adapter: str | None = None) -> str:
    """For the GGUF ``model``, called ``named`` in it, and an adapter's file. Raises ModelError (RW310)."""
    import gguf

    header = read_gguf_header(model).metadata
    lines = [f"FROM {named}"] + ([] if adapter is None else [f"ADAPTER {adapter}"])
    reader = gguf.GGUFReader(model)
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    ids = [header.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    stops = [] if tokens is None else [tokens.contents(index) for index in ids if isinstance(index, int)]
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)]
    length = header.get(f"{header['general.architecture']}.context_length")
    lines += [f"PARAMETER num_ctx {length}"] if length else []
    return "\n".join(lines) + "\n"
