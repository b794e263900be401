"""GGUF files: their headers, and the configs of their models.

A GGUF file: b"GGUF", u32 version, u64 tensors, u64 entries; the entries (key, type, value); the tensors (name, dims,
type, offset); then the tensors' bytes from the next multiple of the alignment. Numbers are little-endian.

The config of a GGUF file has the settings of its header that transformers leaves at their defaults.
"""

from __future__ import annotations

import mmap
import struct
import tempfile
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rankwise.errors import ModelError, warn
from rankwise.foreign import Fields, JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STRING, ARRAY = 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# The value of a header entry; for an array, its length.
Value = str | int | float


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
ARCHITECTURES = ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
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
    if architecture in ARCHITECTURES:
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
