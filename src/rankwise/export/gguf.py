"""``adapter.gguf``: low-rank pairs in the format of llama.cpp and Ollama, by their names and in their order.

The loader computes W x + (alpha / r) B A x, with r read from each B; alpha = r makes that scale 1. In numpy's order
lora_a is (r, in) and lora_b (out, r), of E experts (E, r, in) and (E, out, r), of an embedding (vocabulary, r) and
(dim, r). Rows of W (out, in) and of B (out, r) are ordered alike. llama's family interleaves the two halves of each
head of q and k, since llama.cpp rotates neighbours where transformers rotates halves. Stacked experts lie in one tensor
for each of gate, up and down.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from rankwise.adapters.state import base_modules
from rankwise.disk import naming
from rankwise.errors import AdapterError, ModelError, some_of
from rankwise.export.pairs import Pair, Pairs
from rankwise.models.gguf_file import GgufHeader, read_gguf_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# transformers' model_type: llama.cpp's architecture.
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of the GGUF file, and the rows of transformers' tensor that it takes: one half, or all."""

    name: str
    half: int | None = None

    def of(self, W: Tensor) -> Tensor:
        """W (out, ...), or of stacked experts (E, out, ...)."""
        return W if self.half is None else W.chunk(2, dim=1)[self.half]


class GgufNames:
    """The names for a model of ``config``. Raises ModelError (RW740) for a family that is not converted."""

    def __init__(self, config: PreTrainedConfig) -> None:
        import gguf

        self.config = config.get_text_config()
        kind = str(config.model_type)
        if kind not in ARCHITECTURES:
            raise ModelError(
                "RW740",
                f"models of type {kind} are not converted to GGUF here (those of type {', '.join(ARCHITECTURES)} are); "
                "merge with rankwise merge, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
            )
        self.architecture = ARCHITECTURES[kind]
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._map = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)

    def of(self, name: str) -> list[Part]:
        """The GGUF's tensors of a parameter or module of transformers'. Raises ModelError (RW740) for one without."""
        plain = name.replace("language_model.", "")
        path, _, leaf = plain.rpartition(".")
        if path.endswith(".experts") and leaf == "gate_up_proj":
            gate, up = (self._name(f"{path}.{half}_proj", name) for half in ("gate", "up"))
            return [Part(f"{gate}.weight", 0), Part(f"{up}.weight", 1)]
        found = self._name(plain, name)
        return [Part(found if found.endswith((".weight", ".bias")) else f"{found}.weight")]

    def _name(self, plain: str, name: str) -> str:
        found = self._map.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(
                "RW740",
                f"llama.cpp's {self.architecture} has no tensor for {name}; leave it, and what is tied to it, out of "
                "the adapter, or merge with rankwise merge.",
            )
        return str(found)

    def rows(self, name: str, W: Tensor) -> Tensor:
        """W (out, ...) with its rows in llama.cpp's order."""
        module = name.removesuffix(".weight").removesuffix(".bias")
        if self.architecture != "llama" or not module.endswith((".q_proj", ".k_proj")):
            return W
        config = self.config
        heads = config.num_attention_heads if module.endswith(".q_proj") else config.num_key_value_heads
        return W.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(W.shape)


ADAPTER_FILE = "adapter.gguf"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def gguf_pairs(model: PreTrainedModel, names: GgufNames, pairs: Pairs) -> dict[str, Pair]:
    """{name in the GGUF: (lora_a, lora_b) in the GGUF's row order}, with the shapes above.

    Raises AdapterError (RW742) for an adapter on a tied head or embedding, which llama.cpp would not compute.
    """
    found: dict[str, Pair] = {}
    modules = dict(base_modules(model))
    for name, pair in pairs.items():
        for part in names.of(name):
            B = part.of(pair.B)
            if isinstance(modules.get(name), nn.Embedding):
                found[part.name] = Pair(pair.A.T, B)
            else:
                found[part.name] = Pair(pair.A, names.rows(name, B) if B.dim() == 2 else B)
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
