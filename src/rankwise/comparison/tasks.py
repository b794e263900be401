"""The tasks on which every run is evaluated: the evaluation data, then the chosen tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rankwise.comparison.stages import PERPLEXITY
from rankwise.config import BETA
from rankwise.data import read_rows
from rankwise.data.preference_formats import PREFERENCE_FORMATS
from rankwise.evaluation.settings import EvaluateSettings, split_data
from rankwise.evaluation.tasks.registry import make_task
from rankwise.foreign import Fields

if TYPE_CHECKING:
    from rankwise.evaluation.tasks.base import Task
    from rankwise.evaluation.tasks.perplexity import Perplexity
    from rankwise.evaluation.tasks.preference import Preference


def own_task(eval_data: str, settings: Fields) -> Perplexity | Preference:
    """The loss of demonstrations, or the rewards of preferences.

    ``settings``: objective, beta, max_length, prompt_column and completion_column. Raises DataError as the readers do,
    and as ``Preference``.
    """
    columns = {name: settings[name] for name in ("prompt_column", "completion_column")}
    formats = PREFERENCE_FORMATS.get(settings["objective"])
    rows = read_rows(eval_data, split="validation", formats=formats, **columns)
    if formats is None:
        from rankwise.evaluation.tasks.perplexity import Perplexity

        return Perplexity(rows, max_length=settings["max_length"])
    from rankwise.evaluation.tasks.preference import Preference

    return Preference(rows, max_length=settings["max_length"], beta=settings["beta"] or BETA)


def make_tasks(names: Sequence[str], *, data: Sequence[str], limit: int | None) -> list[Task]:
    """The tasks with their data. ``data``: TASK=FILE for tasks that need a file; ``limit``: the largest number of
    examples of a task.

    Raises what ``rankwise evaluate`` raises for tasks that do not exist, or lack data or packages.
    """
    others = tuple(name for name in dict.fromkeys(names) if name != PERPLEXITY)
    # Checked also without tasks, since data for a task that is not given are refused.
    split_data(tuple(data), others)
    return [make_task(name, EvaluateSettings(task=others, data=tuple(data), limit=limit)) for name in others]
