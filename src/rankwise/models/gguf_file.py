"""GGUF files: their headers, the configs of their models, and the names and the row order of their tensors.

A GGUF file: b"GGUF", u32 version, u64 tensors, u64 entries; the entries (key, type, value); the tensors (name, dims,
type, offset); then the tensors' bytes from the next multiple of the alignment. Numbers are little-endian.

The config of a GGUF file has the settings of its header that transformers leaves at their defaults.

llama's family, and SmolLM3, interleave the two halves of each head of q and k, since llama.cpp rotates neighbours where
transformers rotates halves. Qwen 3.5's linear attention has several heads of values for each of keys: transformers
keeps those of one key together, llama.cpp the first of all keys. Stacked experts lie in one tensor for each of gate, up
and down.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
import tempfile
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rankwise.errors import ModelError, warn
from rankwise.foreign import Fields, JsonObject

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

STRING, ARRAY = 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# The value of a header entry; for an array, its length.
Value = str | int | float
# transformers' model_type: llama.cpp's architecture.
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_5": "qwen35",
    "qwen3_5_text": "qwen35",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
}
# Those whose adapters are written, and whose files are not read in their own bits.
ONLY_ADAPTERS = ("gemma4", "gemma4_text", "mixtral", "phi", "qwen3_5", "qwen3_5_text", "smollm3")


class GgufTensor(NamedTuple):
    """Shape in GGUF's order (fastest first), storage type by ggml's number, byte range in the data section."""

    shape: tuple[int, ...]
    ggml_type: int
    begin: int
    end: int


class GgufHeader(NamedTuple):
    """Scalars and texts of the metadata (arrays as their length), and the tensors."""

    metadata: JsonObject
    tensors: dict[str, GgufTensor]
    # The entries as they are stored, without the arrays of the vocabulary, which take transformers seconds.
    entries: tuple[bytes, ...] = ()
    # The byte at which the tensors' bytes begin.
    data_start: int = 0

    def without_vocabulary(self) -> bytes:
        """A GGUF file with these entries, and tensors of the same names that all are one number."""
        alignment, one_number = self.metadata.get("general.alignment", 32), struct.pack("<IQIQ", 1, 1, 0, 0)
        names = [struct.pack("<Q", len(name.encode())) + name.encode() + one_number for name in self.tensors]
        counts = struct.pack("<IQQ", 3, len(names), len(self.entries))
        return b"".join((b"GGUF", counts, *self.entries, *names, bytes(2 * alignment)))


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file. Raises ModelError (RW310) if it is damaged, or the file shorter than it says."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).header()
    except (struct.error, ArithmeticError, TypeError, ValueError):
        raise ModelError("RW310", f"{path} is cut short inside its header, or damaged; download it again.") from None
    except OSError as problem:
        raise ModelError("RW310", f"{path} cannot be read: {problem.strerror}.") from None


class _Reader:
    """Reads a header; every length is compared with the number of remaining bytes."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.position = path, content, 0

    def fault(self, what: str) -> ModelError:
        return ModelError("RW310", f"{self.path} {what}.")

    def header(self) -> GgufHeader:
        if self.content[:4] != b"GGUF":
            raise self.fault("does not start with GGUF's four letters; give a GGUF file, or the folder of a model")
        self.position = 4
        version = self.number("I")
        if version not in (2, 3):
            raise self.fault(f"is of GGUF version {version}, and 2 and 3 can be read; convert it again")
        tensor_count, entry_count = self.number("Q"), self.number("Q")
        metadata: JsonObject = {}
        entries = []
        for _ in range(entry_count):
            begin = self.position
            key, kind = self.text(), self.number("I")
            metadata[key] = self.value(kind)
            if kind != ARRAY or not key.startswith("tokenizer."):
                entries.append(self.content[begin : self.position])
        if not isinstance(metadata.get("general.architecture"), str):
            raise self.fault("does not name its architecture (general.architecture); convert it again")
        tensors = dict(self.tensor() for _ in range(tensor_count))
        alignment = metadata.get("general.alignment", 32)
        data_start = -(-self.position // alignment) * alignment
        size_bytes = data_start + max((one.end for one in tensors.values()), default=0)
        if size_bytes > len(self.content):
            found = len(self.content)
            raise self.fault(f"has {found:,} bytes and its header promises {size_bytes:,} or more; download it again")
        return GgufHeader(metadata, tensors, tuple(entries), data_start)

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.content, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        start = self.position + 8
        self.skip(self.number("Q"))
        return self.content[start : self.position].decode("utf-8")

    def skip(self, count_bytes: int) -> None:
        if self.position + count_bytes > len(self.content):
            raise ValueError("beyond the end")
        self.position += count_bytes

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return self.text()
        return self.array(self.number("I"), self.number("Q")) if kind == ARRAY else self.number(self.format_of(kind))

    def array(self, kind: int, count: int) -> int:
        """Skip an array and return its length."""
        if kind == STRING:
            # A vocabulary has a hundred thousand texts.
            length_at = struct.Struct("<Q").unpack_from
            for _ in range(count):
                self.skip(8 + length_at(self.content, self.position)[0])
        else:
            self.skip(count * struct.calcsize("<" + self.format_of(kind)))
        return count

    def format_of(self, kind: int) -> str:
        if kind not in FORMATS:
            raise self.fault(f"holds a value of the unknown type {kind}; convert it again")
        return FORMATS[kind]

    def tensor(self) -> tuple[str, GgufTensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self.text(), self.number("I")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind, begin = self.number("I"), self.number("Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise self.fault(f"stores {name!r} as ggml type {kind}, which the installed gguf does not know") from None
        if (row := shape[0] if shape else 1) % block:
            raise self.fault(f"gives {name!r} rows of {row}, which is not a multiple of its block of {block}")
        return name, GgufTensor(shape, kind, begin, begin + prod(shape) // block * block_bytes)


# llama.cpp's architectures whose headers hold one number under each of these keys; others hold lists.
SINGLE_VALUED = ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
# {key of the header: attribute of the config, where the config has it}.
SETTINGS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Numbers of layers of the Gemmas whose scores have a different scale, as llama.cpp tells them.
LARGE_GEMMAS = {"gemma2": 46, "gemma3": 62}


def config_of_gguf(path: Path) -> PreTrainedConfig:
    """The config of the model in a GGUF file.

    Raises ModelError (RW310) for a damaged file. Warns RW321 of settings that transformers' model cannot have.
    """
    from transformers import AutoConfig

    header = read_gguf_header(path)
    architecture = str(header.metadata["general.architecture"])
    start = f"{architecture}."
    own = {key.removeprefix(start): value for key, value in header.metadata.items() if key.startswith(start)}
    # Alone in a folder, since transformers would read an adapter_config.json next to the file.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.gguf").write_bytes(header.without_vocabulary())
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    if "vocab_size" not in own and (tokens := header.metadata.get("tokenizer.ggml.tokens")):
        config.vocab_size = tokens
    ignored = sorted(name for name in header.tensors if name.startswith("rope_"))
    if architecture in SINGLE_VALUED:
        _complete(config, architecture, own)
        ignored += _ignored(config, own)
    if ignored:
        warn(
            "RW321",
            f"{path} holds {', '.join(ignored)}, which transformers ignores, so the model's outputs are wrong, most of "
            "all for long rows; use the safetensors version.",
        )
    return config


def _complete(config: Any, architecture: str, own: Fields) -> None:
    for key, name in SETTINGS.items():
        if key in own and hasattr(config, name):
            setattr(config, name, own[key])
    # Gemma 3 rotates its sliding layers by a base of their own, without scaling.
    parameters = getattr(config, "rope_parameters", None) or {}
    rotary = parameters.get("full_attention", parameters)
    if own.get("rope.scaling.type") == "linear" and own.get("rope.scaling.factor"):
        rotary |= {"rope_type": "linear", "factor": own["rope.scaling.factor"]}
    if architecture == "phi3" and "rope.dimension_count" in own:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary["partial_rotary_factor"] = own["rope.dimension_count"] / head_dim
    if architecture in LARGE_GEMMAS:
        # No header holds it; this is how llama.cpp has it.
        is_large = config.num_hidden_layers == LARGE_GEMMAS[architecture]
        width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = width if is_large else config.head_dim


def _ignored(config: Any, own: Fields) -> list[str]:
    """The settings of the header, in words, that neither transformers nor `_complete` reads."""
    found = []
    if (kind := own.get("rope.scaling.type", "none")) not in ("none", "linear"):
        found.append(f"the {kind} scaling of its positions")
    window = own.get("attention.sliding_window")
    if window and not hasattr(config, "sliding_window") and window < (own.get("context_length") or window):
        found.append(f"a sliding window of {window:,} tokens")
    return found


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

    def adds_one(self, name: str) -> bool:
        """Whether llama.cpp stores the parameter plus one."""
        if self.architecture == "qwen35":
            return name.endswith("norm.weight") and ".linear_attn." not in name
        return self.architecture in ("gemma2", "gemma3") and name.endswith("norm.weight")

    def rows(self, name: str, W: Tensor) -> Tensor:
        """W (out, ...) with its rows in llama.cpp's order."""
        module = name.removesuffix(".weight").removesuffix(".bias")
        if self.architecture == "qwen35" and ".linear_attn." in module:
            return self._value_heads(module.rpartition(".")[2], W)
        if self.architecture not in ("llama", "smollm3") or not module.endswith((".q_proj", ".k_proj")):
            return W
        config = self.config
        heads = config.num_attention_heads if module.endswith(".q_proj") else config.num_key_value_heads
        return W.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(W.shape)

    def columns(self, name: str, A: Tensor) -> Tensor:
        """A (r, in) with its columns in llama.cpp's order."""
        if self.architecture == "qwen35" and name.endswith(".linear_attn.out_proj"):
            return self._by_key(A.T, self.config.linear_value_head_dim).T
        return A

    def _value_heads(self, leaf: str, W: Tensor) -> Tensor:
        import torch

        keys = 2 * self.config.linear_num_key_heads * self.config.linear_key_head_dim
        if leaf in ("in_proj_qkv", "conv1d"):
            return torch.cat([W[:keys], self._by_key(W[keys:], self.config.linear_value_head_dim)])
        if leaf == "in_proj_z":
            return self._by_key(W, self.config.linear_value_head_dim)
        return self._by_key(W, 1) if leaf in ("in_proj_a", "in_proj_b", "A_log", "dt_bias") else W

    def _by_key(self, W: Tensor, width: int) -> Tensor:
        """Heads of ``width`` rows, those of one key together -> the first of every key, then the second."""
        return W.unflatten(0, (self.config.linear_num_key_heads, -1, width)).transpose(0, 1).reshape(W.shape)
