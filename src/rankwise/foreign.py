"""Read untrusted JSON: no NaN, no lone surrogates, no repeated keys, and every field of its declared type."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import pydantic
from pydantic_core import ErrorDetails

from rankwise.errors import RankwiseError

# Any value of JSON, to read.
Json = str | float | None | Sequence["Json"] | Mapping[str, "Json"]
# A JSON object.
JsonObject = dict[str, Any]
Fields = Mapping[str, Any]


class Dataclass(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Dataclass)


def read_json(path: Path, *, constants: bool = False) -> Any:
    """The content of a JSON file. Raises OSError, or ValueError with one of the reasons of ``parse_json``."""
    return parse_json(path.read_bytes(), constants=constants)


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


def read_object(path: Path, *, error: type[RankwiseError], code: str, constants: bool = False) -> JsonObject:
    """The object in a JSON file. Raises ``error(code)``, whose message names the file and the fault."""
    try:
        content = read_json(path, constants=constants)
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


def _whole(text: str) -> int:
    # Above 10^308 no float holds it.
    _finite(text)
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not float("-inf") < number < float("inf"):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number
