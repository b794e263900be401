"""The parts of lm-evaluation-harness that rankwise uses, other than its command line and ``simple_evaluate``.

Its Python interface changes between minor versions. Functions import it when they need it, since that takes seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


@functools.cache
def _all_tasks() -> TaskManager:
    """The harness's own tasks. To read their files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def task_files() -> dict[str, Path | None]:
    """{name: the YAML file that describes it, or None} of every task, group and tag."""
    entries = _all_tasks().task_index.items()
    return {name: Path(entry.yaml_path) if entry.yaml_path else None for name, entry in entries}


def built(spec: str, folder: Path | None = None) -> tuple[dict[str, Task], dict[str, Any]]:
    """({name: task}, {name: group}) for the name of a task or for a YAML file in ``folder``. Reads the data sets."""
    from lm_eval.tasks import TaskManager

    manager = _all_tasks() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    loaded = manager.load([spec])
    return dict(loaded["tasks"]), dict(loaded["groups"])


def own_shots(task: Task) -> int | None:
    """The number of few-shot examples in the task's description."""
    shots: int | None = task.get_config("num_fewshot")
    return shots


def has_examples(task: Task) -> bool:
    """Whether the task has few-shot examples besides its questions: a split of them, or a list.

    Without, the harness takes other questions of the evaluation with their answers.
    """
    given = task.config.fewshot_config
    return given.split is not None or given.samples is not None


def reads_json(task: Task) -> bool:
    """Whether the task reads JSON files, and not a data set that its own code names."""
    return bool(task.DATASET_PATH == "json")


def right_choice(task: Task, doc: Any) -> int | None:
    """The place of the right one among a question's choices. None for a task without choices, or if several are
    right."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def place_of_figures(tasks: Mapping[str, Task], groups: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """(the name under which ``evaluated`` gives the figures of all ``tasks``, the names that they consist of).

    The first name is None for a tag and for a group without aggregates, whose tasks have only figures of their own.
    """
    # ``built`` puts the requested group before its own groups.
    group = next(iter(groups.values()), None)
    parts = list(tasks) if group is None else list(group.child_names)
    if group is not None and group.has_aggregation:
        return str(group.name), parts
    return (next(iter(tasks)) if len(tasks) == 1 else None), parts


def show_examples(task: Task, shots: int, seed: int) -> None:
    """Let the task use ``shots`` few-shot examples, drawn as ``simple_evaluate`` draws them with ``seed``."""
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)


def evaluated(model: LM, tasks: Mapping[str, Task], groups: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """The harness' results with the sample of every question, without building the tasks again."""
    from lm_eval.evaluator import evaluate

    return evaluate(
        lm=model,
        task_dict={"tasks": dict(tasks), "groups": dict(groups)},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
