"""Settings from the command line and the YAML file of ``--config``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic_core import ErrorDetails

from rankwise.errors import ConfigError
from rankwise.foreign import Fields, JsonObject, deepest_faults, fault
from rankwise.options import OPTIONS, Settings, close_names, flag

_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")

SettingsT = TypeVar("SettingsT", bound=Settings)


def read_settings(
    kind: type[SettingsT],
    file: Path | None,
    given: Fields,
    earlier: Callable[[Fields], Fields] | None = None,
) -> SettingsT:
    """Settings from a YAML ``file`` (keys are the long options), overridden by ``given`` from the command line.

    ``earlier`` takes both and returns values of lower priority, such as the settings of a run that is resumed.

    Raises ConfigError: RW102 for a file that cannot be read, RW103 with every wrong or unknown key in one message,
    RW104 for text with a NUL or a byte that is not UTF-8.
    """
    if file is not None:
        _refuse_half_characters({"config": str(file)})
    merged = {
        **(read_settings_file(file) if file else {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    if earlier is not None:
        merged = {**earlier(merged), **merged}
    _refuse_half_characters(merged)
    try:
        return kind.model_validate(merged)
    except pydantic.ValidationError as error:
        # A default that depends on other options is not computed where one of these is wrong.
        faults = (item for item in deepest_faults(error) if item["type"] != "default_factory_not_called")
        problems = dict.fromkeys(_problem(item, kind) for item in faults)
        raise ConfigError("RW103", f"{'; '.join(problems)}.") from None


def _refuse_half_characters(given: Fields) -> None:
    """Raise ConfigError (RW104) for text with a NUL, which no path can hold, or a byte that is not UTF-8 (in Python a
    lone surrogate), which no record can hold."""
    for name, value in given.items():
        odd = next((found for text in _texts([name, value]) if (found := _NO_CHARACTER.search(text))), None)
        if odd is not None:
            what = "a NUL" if odd[0] == "\0" else "a byte that is not UTF-8"
            raise ConfigError("RW104", f"{flag(name)} holds {what} at position {odd.start()}; give text in UTF-8.")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _problem(item: ErrorDetails, kind: type[Settings]) -> str:
    field = str(item["loc"][0])
    extra = getattr(kind.model_fields.get(field), "json_schema_extra", None)
    is_argument = isinstance(extra, dict) and bool(extra.get("argument"))
    name = "the first argument" if is_argument else flag(field)
    if item["type"] == "extra_forbidden":
        ours = [flag(other).removeprefix("--") for other in kind.model_fields]
        close = close_names(name.removeprefix("--"), ours, OPTIONS, cutoff=0.6)
        return f"{name} is not an option" + (f" (did you mean --{close[0]}?)" if close else "")
    if item["type"] == "missing":
        return f"{name} is missing"
    if item["type"] == "literal_error" and is_argument:
        return f"{name} is {item['input']!r}; give {item['ctx']['expected'].replace(chr(39), '')}"
    return f"{name} is {item['input']!r}: {fault(item)}"


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            [(twice, _)] = Counter(keys).most_common(1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_settings_file(file: Path) -> JsonObject:
    """``{key: value}``, keys with underscores. Raises ConfigError (RW102) for a file that cannot be read."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise ConfigError("RW102", f"there is no settings file {file}; check the path of --config.") from None
    except UnicodeDecodeError:
        raise ConfigError("RW102", f"the settings file {file} is not UTF-8; save it as such.") from None
    except OSError as error:
        reason = (error.strerror or "no reason given").lower()
        raise ConfigError("RW102", f"cannot read the settings file {file}: {reason}; give a file.") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        # A list as a key is a TypeError, and a tag that its value does not fit (`!!int x`) a ValueError.
        raise ConfigError("RW102", f"the settings file {file} is not YAML{_where(error)}; correct it there.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError("RW102", f"the settings file {file} holds a {kind}; write one `option: value` a line.")
    given = {str(key).replace("-", "_"): value for key, value in content.items()}
    if len(given) < len(content):
        raise ConfigError("RW102", f"the settings file {file} gives an option twice, with `-` and with `_`; give one.")
    return given


def _where(error: Exception) -> str:
    """The fault and its place: ``: mapping values are not allowed here, line 2, column 4``, where parsing stopped."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return f": {problem}" + (f", line {mark.line + 1}, column {mark.column + 1}" if mark else "")
