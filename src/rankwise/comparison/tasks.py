"""What every run is evaluated on: the loss on the evaluation data, then the chosen tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rankwise.comparison.measure_files import PERPLEXITY
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.evaluation.tasks.registry import make_task

if TYPE_CHECKING:
    from rankwise.evaluation.tasks.base import Task


def make_tasks(
    names: Sequence[str],
    *,
    eval_data: str,
    data: Sequence[str],
    limit: int | None,
    max_length: int,
    columns: Mapping[str, str | None],
) -> list[Task]:
    """The tasks with their data. ``data``: TASK=FILE for tasks that need a file; ``limit``: the most examples of a
    task.

    Raises what ``rankwise evaluate`` raises for tasks that do not exist or lack data or packages.
    """
    others = [name for name in dict.fromkeys(names) if name != PERPLEXITY]
    given = EvaluateSettings(
        task=(PERPLEXITY, *others),
        data=(f"{PERPLEXITY}={eval_data}", *data),
        max_length=max_length,
        prompt_column=columns["prompt_column"],
        completion_column=columns["completion_column"],
    )
    limited = given.model_copy(update={"limit": limit})
    return [make_task(name, given if name == PERPLEXITY else limited) for name in given.task]
