"""Tasks of other distributions: an entry point of the group ``rankwise.tasks`` names a task and gives its TaskType."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pydantic

from rankwise.errors import ConfigError
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.foreign import deepest_faults, fault
from rankwise.options import Settings

if TYPE_CHECKING:
    from rankwise.evaluation.tasks.base import Task

GROUP = "rankwise.tasks"
# Tasks of the distribution `rankwise-article`, for the message where it is not installed.
ARTICLE = ("e2e", "gsm8k", "vicuna")
INSTALL_ARTICLE = "pip install ./article"


@dataclasses.dataclass(frozen=True)
class TaskType:
    """How tasks of a name are made. ``make`` and ``uses`` take the name, the settings and the validated ``options``."""

    make: Callable[[str, EvaluateSettings, Any], Task]
    # The task's own options, which `--set NAME=VALUE` gives.
    options: type[Settings]
    # The names of options, its own and those that not every task uses, which it uses with these settings.
    uses: Callable[[str, EvaluateSettings, Any], Collection[str]]
    # What --data must hold; None where the task needs no --data.
    data: str | None = None


@functools.cache
def entries() -> Mapping[str, EntryPoint]:
    """The installed entry points by the name of their task. Nothing is imported."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def task_type(name: str) -> TaskType | None:
    return entries()[name].load() if name in entries() else None


def own_options(kind: TaskType, settings: EvaluateSettings) -> Settings:
    """What ``--set`` gives of the options of ``kind``. Raises ConfigError (RW103) for a wrong value."""
    given = {name: value for name, value in given_by_set(settings).items() if name in kind.options.model_fields}
    try:
        return kind.options.model_validate(given)
    except pydantic.ValidationError as error:
        problems = (f"--set {item['loc'][0]} is {item['input']!r}: {fault(item)}" for item in deepest_faults(error))
        raise ConfigError("RW103", f"{'; '.join(dict.fromkeys(problems))}.") from None


def given_by_set(settings: EvaluateSettings) -> dict[str, str]:
    """{name: value} of ``--set NAME=VALUE``. Raises ConfigError (RW103) for text without ``=``, or a name given
    twice.
    """
    found: dict[str, str] = {}
    for item in settings.set:
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name in found:
            problem = "twice" if equals else "without a value"
            raise ConfigError("RW103", f"--set gives {name} {problem}; write --set NAME=VALUE once for each option.")
        found[name] = value.strip()
    return found
