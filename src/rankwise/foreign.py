"""Read untrusted files: JSON, with every field of its declared type; the headers of safetensors; pickles never.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, get_type_hints

import pydantic
from pydantic_core import ErrorDetails
from safetensors import SafetensorError, safe_open

from rankwise.errors import ModelError, RankwiseError, one_line, some_of

# Any value of JSON, to read.
Json = str | float | None | Sequence["Json"] | Mapping[str, "Json"]
# A JSON object.
JsonObject = dict[str, Any]
Fields = Mapping[str, Any]


class Dataclass(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Dataclass)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError, or ValueError if it is not JSON."""
    return parse_json(path.read_bytes())


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text, as ``json.loads`` gives it. Raises ValueError if it is not JSON."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path, *, error: type[RankwiseError], code: str) -> JsonObject:
    """The object in a JSON file. Raises ``error(code)``, whose message names the file and the fault."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as problem:
        raise error(code, f"cannot read {path} as JSON ({one_line(problem)}); get it again.") from None
    if not isinstance(content, dict):
        raise error(code, f"{path} holds a JSON {type(content).__name__} and not an object; get it again.")
    return content


def checked(kind: type[T], content: Json) -> T:
    """``content`` as an instance of the dataclass ``kind``, with every field of its declared type.

    Fields that ``kind`` does not declare are dropped. Raises ValueError that names the first wrong field.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} and not an object")
    model = _strict_model(kind)
    try:
        # Validated only for the errors: pydantic would turn 12 into 12.0 where the field is a float.
        model.model_validate(content, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {fault(first)}") from None
    return kind(**{name: content[name] for name in model.model_fields if name in content})


def wrong_fields(given: Dataclass) -> list[str]:
    """A message such as ``r is 0: input should be greater than or equal to 1`` for each field of a dataclass whose
    value breaks its annotated type or bounds."""
    kind = type(given)
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(kind)}
    try:
        _strict_model(kind).model_validate(values, strict=True, context="values")
    except pydantic.ValidationError as error:
        return [f"{_place(item['loc'], values)} is {item['input']!r}: {fault(item)}" for item in deepest_faults(error)]
    return []


def deepest_faults(error: pydantic.ValidationError) -> list[ErrorDetails]:
    """The deepest error of each value: for a union, pydantic reports one error per member type."""
    problems, depths = error.errors(), dict[object, int]()
    for item in problems:
        depths[item["loc"][0]] = max(depths.get(item["loc"][0], 0), len(item["loc"]))
    return [item for item in problems if len(item["loc"]) == depths[item["loc"][0]]]


def fault(item: ErrorDetails) -> str:
    """pydantic's message, worded to end a sentence."""
    reason = item["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
    return f"{reason[0].lower()}{reason[1:]}"


def _place(location: Sequence[int | str], values: Fields) -> str:
    """A pydantic location as ``rank_pattern['q_proj']``, without the union members that pydantic adds to it."""
    name, value = str(location[0]), values[str(location[0])]
    for part in location[1:]:
        if isinstance(part, int) or (isinstance(value, Mapping) and part in value):
            name, value = f"{name}[{part!r}]", value[part]
    return name


@functools.cache
def _strict_model(kind: type[Dataclass]) -> type[pydantic.BaseModel]:
    types = get_type_hints(kind, include_extras=True)
    fields: JsonObject = {}
    for field in dataclasses.fields(kind):
        default: Any = ... if field.default is dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = pydantic.Field(default_factory=field.default_factory)
        fields[field.name] = (types[field.name], default)
    return pydantic.create_model(kind.__name__, **fields)


# --- weights ---


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


def refuse_pickles(folder: Path, *, error: type[RankwiseError] = ModelError, code: str = "RW307") -> None:
    """Raise ``error(code)`` where ``folder`` holds pickled weights and no safetensors file."""
    pickles = sorted(file.name for file in Path(folder).iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
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
