"""Read weights files as untrusted input: check headers before any allocation, and never open a pickle.

A safetensors file is an unsigned 64-bit length N (little-endian), N bytes of JSON, then the tensors' bytes:

    {"__metadata__": {str: str}, NAME: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets are counted from the end of the JSON. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeGuard

from rankwise.errors import ModelError, RankwiseError
from rankwise.foreign import Json, JsonObject, each_once, parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_ELEMENTS = 2**62

# Bits per element of every dtype that the format names.
BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
AGAIN = "download it again"


class TensorInfo(NamedTuple):
    """One tensor of the file: its bytes are [begin, end) of the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class WeightsHeader(NamedTuple):
    """The header of a safetensors file: every tensor by name, and the free-form metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path, *, error: type[RankwiseError] = ModelError, code: str = "RW306") -> WeightsHeader:
    """Read and check the header of a safetensors file, without its tensors.

    Raises ``error(code)``, whose message names the file, where the file is missing, truncated or not safetensors, or
    the header is inconsistent: unknown dtypes, shapes that do not fit their bytes, overlaps, gaps, duplicates.
    """
    try:
        return _read_header(Path(path))
    except Malformed as problem:
        raise error(code, f"{path} {problem}.") from None
    except FileNotFoundError:
        raise error(
            code, f"{Path(path).parent} holds no {Path(path).name}; {AGAIN}, or give a folder that has it."
        ) from None
    except OSError as problem:
        reason = problem.strerror or type(problem).__name__
        raise error(code, f"{path} cannot be read: {reason}.") from None


class Malformed(Exception):
    """A malformed file. The message is the rest of a sentence that starts with the file's name."""


def _read_header(path: Path) -> WeightsHeader:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        # Opening a named pipe would block.
        raise Malformed(f"is not a regular file; {AGAIN}")
    size_bytes = status.st_size
    with open(path, "rb") as file:
        start = file.read(64)
        _refuse_other_formats(start)
        if size_bytes < 8:
            raise Malformed(f"is {size_bytes:,} bytes, too short for a safetensors file; {AGAIN}")
        (header_bytes,) = struct.unpack_from("<Q", start)
        if header_bytes > MAX_HEADER_BYTES:
            raise Malformed(
                f"claims a header of {header_bytes:,} bytes where at most {MAX_HEADER_BYTES:,} are allowed; "
                "it is damaged or no safetensors file"
            )
        if 8 + header_bytes > size_bytes:
            raise Malformed(f"is {size_bytes:,} bytes where its header alone promises {8 + header_bytes:,}; {AGAIN}")
        file.seek(8)
        content = _parse(file.read(header_bytes))
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Malformed("has a `__metadata__` that does not map text to text; write the file again")
    tensors = {name: _checked_tensor(name, entry) for name, entry in content.items()}
    _check_layout(tensors, data_start=8 + header_bytes, size_bytes=size_bytes)
    return WeightsHeader(tensors, metadata)


def _refuse_other_formats(start: bytes) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise Malformed("is a Git LFS pointer and not the weights; run `git lfs pull` in its repository")
    is_zip, is_pickle = start.startswith(b"PK\x03\x04"), start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"
    # In a real header the last bytes of the length are zero, and byte 8 opens the JSON object.
    if is_zip or (is_pickle and start[8:9] != b"{"):
        raise Malformed(
            "is a pickle under the name of a safetensors file; it is never loaded, since a pickle can run any code: "
            "get the safetensors version"
        )


def _parse(text: bytes) -> JsonObject:
    try:
        content = parse_json(text, pairs=each_once)
    except ValueError as problem:
        reason = " ".join(str(problem).split())[:120]
        raise Malformed(f"has a header that is not valid JSON ({reason}); {AGAIN}") from None
    if not isinstance(content, dict):
        raise Malformed(f"has a header that is a JSON {type(content).__name__} and not an object; {AGAIN}")
    return content


def _checked_tensor(name: str, entry: Json) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise Malformed(f"describes the tensor {name!r} without dtype, shape and data_offsets; {AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Malformed(f"stores {name!r} as {str(dtype)[:40]!r}, which is not a safetensors dtype; write it again")
    if not _are_sizes(shape) or prod(shape) > MAX_ELEMENTS:
        raise Malformed(f"gives {name!r} the impossible shape {str(shape)[:80]}; {AGAIN}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Malformed(f"gives {name!r} the impossible byte range {str(offsets)[:80]}; {AGAIN}")
    bits = prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise Malformed(
            f"stores {name!r} in {offsets[1] - offsets[0]:,} bytes where {dtype} of shape {shape} "
            f"takes {bits / 8:,.15g}; {AGAIN}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: Json) -> TypeGuard[list[int]]:
    if not isinstance(values, list):
        return False
    return all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 for value in values)


def _check_layout(tensors: dict[str, TensorInfo], *, data_start: int, size_bytes: int) -> None:
    """Check that the tensors fill the data section exactly: no overlap, no gap, nothing past the end."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < position:
            raise Malformed(f"stores {name!r} over another tensor's bytes; it is damaged or hostile, {AGAIN}")
        if info.begin > position:
            raise Malformed(f"has {info.begin - position:,} bytes before {name!r} that belong to no tensor; {AGAIN}")
        position = info.end
    promised = data_start + position
    if size_bytes != promised:
        raise Malformed(f"is {size_bytes:,} bytes where its header promises {promised:,}; {AGAIN}")


def pickles_in(folder: Path) -> list[Path]:
    """The files in ``folder`` whose names are those of pickled weights or states, sorted."""
    files = sorted(file for file in Path(folder).iterdir() if file.is_file())
    return [file for file in files if file.suffix.lower() in PICKLE_SUFFIXES]


def refuse_pickles(folder: Path, *, error: type[RankwiseError] = ModelError, code: str = "RW307") -> None:
    """Raise ``error(code)`` where ``folder`` holds pickled weights and no safetensors file."""
    pickles = [file.name for file in pickles_in(folder)]
    if pickles and not any(Path(folder).glob("*.safetensors")):
        raise pickle_refusal(str(folder), pickles, error=error, code=code)


def pickle_refusal(
    where: str, names: list[str], *, error: type[RankwiseError] = ModelError, code: str = "RW307"
) -> RankwiseError:
    """The error for ``names``, the pickled files that are the only weights in ``where``."""
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return error(
        code,
        f"{where} holds its weights as pickle only ({listed}), which is never loaded, since a pickle can run any "
        "code; take a version with safetensors, or convert it once where you trust its origin: "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER).",
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """One SHA-256 for several files: that of a single file, or that of the sorted lines ``HASH  NAME``."""
    hashes = {path.name: sha256_of(path) for path in paths}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
