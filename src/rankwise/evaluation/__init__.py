"""Evaluation of models: tasks, metrics and their records.

The names in ``__all__`` are the interface for tasks of other distributions. They are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.acceleration.generation import Decoding as Decoding
    from rankwise.evaluation.engine import Engine as Engine
    from rankwise.evaluation.record import Example as Example
    from rankwise.evaluation.record import Lines as Lines
    from rankwise.evaluation.record import TaskResult as TaskResult
    from rankwise.evaluation.record import text_sha256 as text_sha256
    from rankwise.evaluation.settings import EvaluateSettings as EvaluateSettings
    from rankwise.evaluation.tasks.base import Mean as Mean
    from rankwise.evaluation.tasks.base import Question as Question
    from rankwise.evaluation.tasks.base import Summary as Summary
    from rankwise.evaluation.tasks.base import Task as Task
    from rankwise.evaluation.tasks.base import Tell as Tell
    from rankwise.evaluation.tasks.base import mean_of as mean_of
    from rankwise.evaluation.tasks.base import write_answers as write_answers
    from rankwise.evaluation.tasks.making import TaskType as TaskType
    from rankwise.evaluation.tasks.making import harness_task as harness_task
    from rankwise.evaluation.tasks.names import harness_folder as harness_folder

_HOMES = {
    "Decoding": "rankwise.acceleration.generation",
    "Engine": "rankwise.evaluation.engine",
    "EvaluateSettings": "rankwise.evaluation.settings",
    "Example": "rankwise.evaluation.record",
    "Lines": "rankwise.evaluation.record",
    "Mean": "rankwise.evaluation.tasks.base",
    "Question": "rankwise.evaluation.tasks.base",
    "Summary": "rankwise.evaluation.tasks.base",
    "Task": "rankwise.evaluation.tasks.base",
    "TaskResult": "rankwise.evaluation.record",
    "TaskType": "rankwise.evaluation.tasks.making",
    "Tell": "rankwise.evaluation.tasks.base",
    "harness_folder": "rankwise.evaluation.tasks.names",
    "harness_task": "rankwise.evaluation.tasks.making",
    "mean_of": "rankwise.evaluation.tasks.base",
    "text_sha256": "rankwise.evaluation.record",
    "write_answers": "rankwise.evaluation.tasks.base",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
