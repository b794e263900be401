"""Read untrusted JSON, with every field of its declared type."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import pydantic
from pydantic_core import ErrorDetails

from rankwise.errors import RankwiseError, one_line

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
