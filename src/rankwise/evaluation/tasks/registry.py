"""Find tasks by name, and read and check their data. lm-evaluation-harness is imported only if it is needed."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from rankwise.errors import ConfigError
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.evaluation.tasks.names import check_tasks, given_by_set, own_options, task_type
from rankwise.options import flag

if TYPE_CHECKING:
    from rankwise.evaluation.tasks.base import Task

# Options that not every task uses.
BY_PERPLEXITY = ("max_length", "prompt_column", "completion_column", "chat_template")
BY_HARNESS = ("num_fewshot", "fewshot_data")


def make_tasks(settings: EvaluateSettings) -> list[Task]:
    """The requested tasks with their data. Raises as ``make_task``, and RW112 for an option that no task uses."""
    duplicates = sorted({name for name in settings.task if settings.task.count(name) > 1})
    if duplicates:
        raise ConfigError("RW112", f"--task {', '.join(duplicates)} is given twice; once is enough.")
    check_options(settings)
    return [make_task(name, settings) for name in settings.task]


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
    check_tasks([name])
    return harness_task(name, settings, data)


def _perplexity(settings: EvaluateSettings, data: str) -> Task:
    from rankwise.data import read_rows
    from rankwise.evaluation.loading import max_length_of
    from rankwise.evaluation.tasks.perplexity import Perplexity

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
