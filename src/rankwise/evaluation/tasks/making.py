"""Tasks with their data, from the settings of ``rankwise evaluate``.

lm-evaluation-harness and torch are imported only if a task needs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import pydantic

from rankwise.errors import ConfigError
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.evaluation.tasks import names
from rankwise.foreign import deepest_faults, fault
from rankwise.options import Settings, flag

if TYPE_CHECKING:
    from rankwise.evaluation.tasks.base import Task

# Options that not every task uses.
BY_PERPLEXITY = ("max_length", "prompt_column", "completion_column", "chat_template")
BY_HARNESS = ("num_fewshot", "fewshot_data")


@dataclasses.dataclass(frozen=True)
class TaskType:
    """How tasks of a name are made. ``make`` and ``uses`` take the name, the settings and the validated ``options``."""

    make: Callable[[str, EvaluateSettings, Any], Task]
    # The task's own options, which `--set NAME=VALUE` gives.
    options: type[Settings]
    # The names of options, its own and those that not every task uses, which it uses with these settings.
    uses: Callable[[str, EvaluateSettings, Any], Collection[str]]
    # What --data must hold; None if the task needs no --data.
    data: str | None = None


def task_type(name: str) -> TaskType | None:
    return names.entries()[name].load() if name in names.entries() else None


def make_tasks(settings: EvaluateSettings, rows: Any = None) -> list[Task]:
    """The requested tasks with their data; ``rows`` in memory are those of perplexity. Raises as ``make_task``, and
    RW112 for an option that no task uses.
    """
    if rows is not None and settings.task != ("perplexity",):
        raise ConfigError("RW112", "rows in memory are for --task perplexity alone; give other tasks a file.")
    duplicates = sorted({name for name in settings.task if settings.task.count(name) > 1})
    if duplicates:
        raise ConfigError("RW112", f"--task {', '.join(duplicates)} is given twice; once is enough.")
    check_options(settings)
    return [make_task(name, settings) if rows is None else _perplexity(settings, rows) for name in settings.task]


def check_options(settings: EvaluateSettings) -> None:
    """Raise ConfigError (RW112) for options that none of the tasks uses."""
    fields, own = EvaluateSettings.model_fields, given_by_set(settings)
    asked = [name for name in (*BY_PERPLEXITY, *BY_HARNESS) if getattr(settings, name) != fields[name].default]
    if not asked and not own:
        return
    used = {option for name in settings.task for option in _used(name, settings)}
    ignored = [flag(name) for name in asked if name not in used]
    ignored += [f"--set {name}" for name in own if name not in used]
    if ignored:
        known = ", ".join(sorted({*used} - {*BY_PERPLEXITY, *BY_HARNESS})) or "nothing"
        given = f"{' and '.join(ignored)}; leave it out (--set takes {known} here)"
        raise ConfigError("RW112", f"--task {', '.join(settings.task)} would ignore {given}.")


def _used(name: str, settings: EvaluateSettings) -> Collection[str]:
    kind = task_type(name)
    if name == "perplexity" or kind is None:
        return BY_PERPLEXITY if name == "perplexity" else BY_HARNESS
    return kind.uses(name, settings, own_options(kind, settings))


def make_task(name: str, settings: EvaluateSettings) -> Task:
    """The task ``name`` with its data read.

    Raises ConfigError: RW150 data that must be given, RW112 options that do not go together, RW153 a missing package,
    RW154 no such task; DataError (RW251) for data that do not fit.
    """
    data, kind = settings.data_of(name), task_type(name)
    if name == "perplexity":
        if data is None:
            raise ConfigError("RW150", "--task perplexity needs data; give --data F with any file of rows.")
        return _perplexity(settings, data)
    if kind is not None:
        if kind.data is not None and data is None:
            raise ConfigError("RW150", f"--task {name} needs data; give --data F with {kind.data}.")
        return kind.make(name, settings, own_options(kind, settings))
    names.check_tasks([name])
    return harness_task(name, settings, data)


def _perplexity(settings: EvaluateSettings, data: Any) -> Task:
    from rankwise.data import read_rows
    from rankwise.evaluation.engine import max_length_of
    from rankwise.evaluation.tasks.rows import Perplexity

    columns = (settings.prompt_column, settings.completion_column)
    rows = read_rows(data, split="validation", prompt_column=columns[0], completion_column=columns[1])
    length = max_length_of(settings.adapter) if settings.max_length is None else settings.max_length
    return Perplexity(rows[: settings.limit], max_length=length)


def harness_task(name: str, settings: EvaluateSettings, data: str | None) -> Task:
    """The task ``name`` of lm-evaluation-harness."""
    from rankwise.evaluation.tasks.harness import HarnessTask

    return HarnessTask(
        name,
        data=data,
        fewshot_data=settings.fewshot_data,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
    )


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
