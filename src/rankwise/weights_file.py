"""Weights files: the headers of safetensors, as the library checks them, and pickles, which are never opened.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from rankwise.errors import ModelError, RankwiseError, one_line, some_of

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
AGAIN = "download it again"


class TensorInfo(NamedTuple):
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        # The first number in a dtype's name counts its bits: F32, BF16, F8_E4M3.
        found = re.search(r"\d+", self.dtype.replace("BOOL", "U8"))
        assert found is not None, "safetensors names no other dtypes"
        return math.prod(self.shape) * int(found[0]) // 8


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
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {name: TensorInfo(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
            return WeightsHeader(tensors, file.metadata() or {})
    except SafetensorError as problem:
        raise error(code, f"{path} {_what_it_is(path, problem)}.") from None
    except OSError as problem:
        raise error(code, f"{path} cannot be read: {problem.strerror or problem}.") from None


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
        raise error(
            code,
            f"{folder} holds its weights as pickle only ({some_of(pickles, 3)}), which is never loaded, since a pickle "
            "can run any code; take a version with safetensors, or convert it once where you trust its origin: "
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
