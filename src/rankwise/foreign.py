"""Read untrusted files within limits: the size, depth, digits and characters of JSON, and the unpacked size of gzip."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import pydantic
from pydantic_core import ErrorDetails

from rankwise.errors import RankwiseError

LARGEST_BYTES = 50_000_000
DEEPEST = 64
# Maximum digits of an integer. Tokenizers write a maximum length of 10^30; integers above 10^308 fit in no float.
LONGEST_NUMBER = 40
# A packed file may hold this many bytes plus this many times its size. Text shrinks to a fifth, zeros 1,000 times.
UNPACKED_BYTES, UNPACKED_TIMES = 16_000_000, 50

# Any value of JSON, to read.
Json = str | float | None | Sequence["Json"] | Mapping[str, "Json"]
# A JSON object.
JsonObject = dict[str, Any]
Fields = Mapping[str, Any]


class Dataclass(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Dataclass)


def read_json(path: Path, *, largest_bytes: int = LARGEST_BYTES, constants: bool = False) -> Any:
    """The content of a JSON file.

    Raises OSError, or ValueError with the reason: not a regular file, too large, or one of ``parse_json``.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        # Reading a named pipe would block.
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file:
        content = file.read(largest_bytes + 1)
    if len(content) > largest_bytes:
        raise ValueError(f"it is larger than {largest_bytes:,} bytes")
    return parse_json(content, constants=constants)


def parse_json(
    content: bytes | str,
    *,
    constants: bool = False,
    halves: bool = False,
    pairs: Callable[..., object] | None = None,
) -> Any:
    """The value of a JSON text, as ``json.loads`` gives it.

    ``constants`` admits NaN and infinities; ``halves`` admits a lone surrogate, which a model can write; ``pairs`` is
    the ``object_pairs_hook``. Raises ValueError with the reason: not UTF-8, not JSON, nested too deeply, a number out
    of range, a lone surrogate.
    """
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    try:
        found = json.loads(
            text,
            parse_int=_whole,
            parse_float=float if constants else _finite,
            parse_constant=None if constants else _finite,
            object_pairs_hook=pairs,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(found)
    if not halves and ("\\ud" in text or "\\uD" in text):
        # A lone surrogate is not a character, and text that holds one cannot be encoded.
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def each_once(pairs: list[tuple[str, Json]]) -> JsonObject:
    """An ``object_pairs_hook``. Raises ValueError for a key that occurs twice, of which Python would keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return content


def most_unpacked(packed_bytes: int, times: int = UNPACKED_TIMES) -> int:
    """The most bytes that a packed file of ``packed_bytes`` may hold."""
    return UNPACKED_BYTES + times * packed_bytes


def unpacked(content: bytes) -> bytes:
    """The content of gzip data. Raises ValueError with the reason: truncated, not gzip, or unpacks beyond the limit."""
    limit = most_unpacked(len(content))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            found = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"it is cut short or no gzip file ({error})") from None
    if len(found) > limit:
        raise ValueError(
            f"its {len(content):,} bytes unpack to more than {limit:,}; if that is intended, give the unpacked file"
        )
    return found


def read_object(
    path: Path,
    *,
    error: type[RankwiseError],
    code: str,
    constants: bool = False,
    largest_bytes: int = LARGEST_BYTES,
) -> JsonObject:
    """The object in a JSON file. Raises ``error(code)``, whose message names the file and the fault."""
    try:
        content = read_json(path, constants=constants, largest_bytes=largest_bytes)
    except (OSError, ValueError) as problem:
        raise error(code, f"cannot read {path} as JSON ({reason_of(problem)}); get it again.") from None
    if not isinstance(content, dict):
        raise error(code, f"{path} holds a JSON {type(content).__name__} and not an object; get it again.")
    return content


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, in one line, for use inside a sentence that names the file."""
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())


def checked(kind: type[T], content: Json) -> T:
    """``content`` as an instance of the dataclass ``kind``, with every field of its declared type.

    Fields that ``kind`` does not declare are dropped. Raises ValueError that names the first wrong field.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} and not an object")
    model = _strict_model(kind)
    try:
        # Validated for the errors alone: pydantic would turn 12 into 12.0 where the field is a float.
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


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not float("-inf") < number < float("inf"):
        raise ValueError(f"{text[:LONGEST_NUMBER]} is not a finite number")
    return number


def check_depth(content: Json) -> None:
    """Raise ValueError for JSON of more levels than ``DEEPEST``, at which recursive functions would fail."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(DEEPEST):
        inner = (item for part in level for item in (part.values() if isinstance(part, dict) else part))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")
