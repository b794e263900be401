"""Weights files: the headers of safetensors, as the library checks them, and pickles, which are never opened.

A safetensors file is an unsigned 64-bit length N (little-endian), N bytes of JSON, then the tensors' bytes. Imports no
torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from rankwise.errors import ModelError, RankwiseError, one_line
from rankwise.foreign import each_once

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

    Raises ``error(code)``, whose message names the file, for a missing, truncated or inconsistent one.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise error(code, f"{path.parent} holds no {path.name}; {AGAIN}, or give a folder that has it.")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        with open(path, "rb") as stream:
            content = json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=each_once)
    except (SafetensorError, ValueError) as problem:
        raise error(code, f"{path} {_what_it_is(path, problem)}.") from None
    except OSError as problem:
        raise error(code, f"{path} cannot be read: {problem.strerror or problem}.") from None
    content.pop("__metadata__", None)
    tensors = {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in content.items()
    }
    return WeightsHeader(tensors, metadata)


def _what_it_is(path: Path, problem: Exception) -> str:
    """The rest of a sentence about a file that safetensors refuses, which starts with the file's name."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(b"version https://"):
        return "is a Git LFS pointer and not the weights; run `git lfs pull` in its repository"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return (
            "is a pickle under the name of a safetensors file; it is never loaded, since a pickle can run any code: "
            "get the safetensors version"
        )
    return f"is damaged or no safetensors file ({one_line(problem)}); {AGAIN}"


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
