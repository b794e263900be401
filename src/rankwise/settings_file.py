"""Settings from the command line and the YAML file of ``--config``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pydantic
import yaml
from pydantic_core import ErrorDetails

from rankwise.errors import ConfigError, one_line
from rankwise.foreign import Fields, JsonObject, deepest_faults, fault
from rankwise.options import OPTIONS, Settings, close_names, flag

SettingsT = TypeVar("SettingsT", bound=Settings)


def read_settings(
    kind: type[SettingsT],
    file: Path | None,
    given: Fields,
    earlier: Callable[[Fields], Fields] | None = None,
) -> SettingsT:
    """Settings from a YAML ``file`` (keys are the long options), overridden by ``given`` from the command line.

    ``earlier`` takes both and returns values of lower priority, such as the settings of a run that is resumed.

    Raises ConfigError: RW102 for a file that cannot be read, RW103 with every wrong or unknown key in one message.
    """
    merged = {
        **(read_settings_file(file) if file else {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    if earlier is not None:
        merged = {**earlier(merged), **merged}
    try:
        return kind.model_validate(merged)
    except pydantic.ValidationError as error:
        # A default that depends on other options is not computed where one of these is wrong.
        faults = (item for item in deepest_faults(error) if item["type"] != "default_factory_not_called")
        problems = dict.fromkeys(_problem(item, kind) for item in faults)
        raise ConfigError("RW103", f"{'; '.join(problems)}.") from None


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


def read_settings_file(file: Path) -> JsonObject:
    """``{key: value}``, keys with underscores. Raises ConfigError (RW102) for a file that cannot be read."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError("RW102", f"cannot read the settings file {file}: {one_line(error)}; give a file.") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        # A list as a key is a TypeError, and text not in UTF-8 a ValueError.
        raise ConfigError("RW102", f"the settings file {file} is not YAML ({one_line(error)}); correct it.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError("RW102", f"the settings file {file} holds a {kind}; write one `option: value` a line.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}
