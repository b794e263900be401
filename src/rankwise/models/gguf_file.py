"""Untrusted GGUF files: their headers, checked before readers that do not check them, and their configs.

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
from rankwise.models.folder import check_values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STRING, ARRAY = 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_DIMENSIONS = 8
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

    def without_vocabulary(self) -> bytes:
        """A GGUF file with these entries, and tensors of the same names that all are one number."""
        alignment, one_number = self.metadata.get("general.alignment", 32), struct.pack("<IQIQ", 1, 1, 0, 0)
        names = [struct.pack("<Q", len(name.encode())) + name.encode() + one_number for name in self.tensors]
        counts = struct.pack("<IQQ", 3, len(names), len(self.entries))
        return b"".join((b"GGUF", counts, *self.entries, *names, bytes(2 * alignment)))


class Malformed(Exception):
    """A malformed file. The message is the rest of a sentence that starts with the file's name."""


def read_gguf_header(path: Path) -> GgufHeader:
    """The checked header of a GGUF file. Raises ModelError (RW310) with one sentence that names the file."""
    try:
        with open(path, "rb") as file:
            size_bytes = file.seek(0, 2)
            if size_bytes < 24:
                raise Malformed(f"is {size_bytes:,} bytes, too short for a GGUF file; download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content).header()
    except Malformed as problem:
        raise ModelError("RW310", f"{path} {problem}.") from None
    except struct.error:
        raise ModelError("RW310", f"{path} ends inside its header; download it again.") from None
    except UnicodeDecodeError:
        raise ModelError("RW310", f"{path} holds text that is not UTF-8; download it again.") from None
    except OSError as problem:
        raise ModelError("RW310", f"{path} cannot be read: {problem.strerror}.") from None


class _Reader:
    """Reads a header; every length is compared with the number of remaining bytes."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.position = content, 0

    def header(self) -> GgufHeader:
        if self.content[:4] != b"GGUF":
            raise Malformed("does not start with GGUF's four letters; give a GGUF file, or the folder of a model")
        self.position = 4
        version = self.number("I")
        if version not in (2, 3):
            raise Malformed(f"is of GGUF version {version}, where 2 and 3 can be read; convert it again")
        tensor_count, entry_count = self.number("Q"), self.number("Q")
        metadata: JsonObject = {}
        entries = []
        for _ in range(entry_count):
            begin = self.position
            key, kind = self.text(), self.number("I")
            value = self.value(kind)
            if kind != ARRAY or not key.startswith("tokenizer."):
                entries.append(self.content[begin : self.position])
            if key in metadata:
                # Readers differ in which one they take.
                raise Malformed(f"holds the setting {key!r} twice; convert it again")
            metadata[key] = value
        if not isinstance(metadata.get("general.architecture"), str):
            raise Malformed("does not name its architecture (general.architecture); convert it again")
        tensors = [self.tensor() for _ in range(tensor_count)]
        return GgufHeader(metadata, self.checked(tensors, metadata), tuple(entries))

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
            raise Malformed("is cut short inside its header, or claims lengths beyond its end; download it again")
        self.position += count_bytes

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind not in FORMATS:
            raise Malformed(f"holds a value of the unknown type {kind}; convert it again")
        return self.number(FORMATS[kind])

    def array(self, kind: int, count: int) -> int:
        """Skip an array and return its length."""
        if kind in FORMATS:
            self.skip(count * struct.calcsize("<" + FORMATS[kind]))
        elif kind == STRING:
            # A vocabulary has a hundred thousand texts.
            length_at = struct.Struct("<Q").unpack_from
            for _ in range(count):
                self.skip(8 + length_at(self.content, self.position)[0])
        else:
            raise Malformed(f"holds an array of the unknown type {kind}; convert it again")
        return count

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(), self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise Malformed(f"gives {name!r} {dimensions:,} dimensions; it is damaged, download it again")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, shape, self.number("I"), self.number("Q")

    def checked(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], metadata: JsonObject
    ) -> dict[str, GgufTensor]:
        from gguf import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        start, tensors = self.data_start(metadata.get("general.alignment", 32)), {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise Malformed(f"holds the tensor {name!r} twice; convert it again")
            if kind not in sizes:
                raise Malformed(f"stores {name!r} as ggml type {kind}, which the installed gguf package does not know")
            block, block_bytes = sizes[kind]
            if (shape[0] if shape else 1) % block:
                raise Malformed(f"gives {name!r} rows of {shape[0]}, which is not a multiple of its block of {block}")
            end = offset + prod(shape) // block * block_bytes
            if start + end > len(self.content):
                raise Malformed(
                    f"is {len(self.content):,} bytes where its header promises {start + end:,} or more; "
                    "download it again"
                )
            tensors[name] = GgufTensor(shape, kind, offset, end)
        position = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if tensor.begin < position:
                raise Malformed(f"stores {name!r} over another tensor's bytes; it is damaged, download it again")
            position = tensor.end
        return tensors

    def data_start(self, alignment: Value) -> int:
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise Malformed(f"has the alignment {alignment!r}, which is not a power of two; convert it again")
        return (self.position + alignment - 1) // alignment * alignment


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
    check_values(own, path, "RW310")
    # Alone in a folder, since transformers would read an adapter_config.json next to the file.
    with tempfile.TemporaryDirectory() as alone:
        Path(alone, "model.gguf").write_bytes(header.without_vocabulary())
        config: PreTrainedConfig = AutoConfig.from_pretrained(alone, gguf_file="model.gguf")
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
        config.query_pre_attn_scalar = query_scale(architecture, config)


def query_scale(architecture: str, config: Any) -> int:
    """``query_pre_attn_scalar`` of a Gemma, which no header holds, as llama.cpp has it."""
    if config.num_hidden_layers == LARGE_GEMMAS[architecture]:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _ignored(config: Any, own: Fields) -> list[str]:
    """The settings of the header, in words, that neither transformers nor `_complete` reads."""
    found = []
    if (kind := own.get("rope.scaling.type", "none")) not in ("none", "linear"):
        found.append(f"the {kind} scaling of its positions")
    window = own.get("attention.sliding_window")
    if window and not hasattr(config, "sliding_window") and window < (own.get("context_length") or window):
        found.append(f"a sliding window of {window:,} tokens")
    return found
