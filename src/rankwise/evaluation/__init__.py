"""Evaluation of models: tasks, metrics and their records.

The names in ``__all__`` are the interface for tasks of other distributions. They are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.acceleration.generation import Decoding
    from rankwise.evaluation.engine import Engine
    from rankwise.evaluation.errors_of_means import Mean, error_of_shares, mean_of, paired_difference, shares_of_ratio
    from rankwise.evaluation.record import Example, Lines, TaskResult, text_sha256
    from rankwise.evaluation.settings import EvaluateSettings
    from rankwise.evaluation.tasks.base import Question, Summary, Task, Tell, warn_of_empty, write_answers
    from rankwise.evaluation.tasks.names import TaskType, harness_folder
    from rankwise.evaluation.tasks.registry import harness_task

_HOMES = {
    "Decoding": "rankwise.acceleration.generation",
    "Engine": "rankwise.evaluation.engine",
    "EvaluateSettings": "rankwise.evaluation.settings",
    "Example": "rankwise.evaluation.record",
    "Lines": "rankwise.evaluation.record",
    "Mean": "rankwise.evaluation.errors_of_means",
    "Question": "rankwise.evaluation.tasks.base",
    "Summary": "rankwise.evaluation.tasks.base",
    "Task": "rankwise.evaluation.tasks.base",
    "TaskResult": "rankwise.evaluation.record",
    "TaskType": "rankwise.evaluation.tasks.names",
    "Tell": "rankwise.evaluation.tasks.base",
    "error_of_shares": "rankwise.evaluation.errors_of_means",
    "harness_folder": "rankwise.evaluation.tasks.names",
    "harness_task": "rankwise.evaluation.tasks.registry",
    "mean_of": "rankwise.evaluation.errors_of_means",
    "paired_difference": "rankwise.evaluation.errors_of_means",
    "shares_of_ratio": "rankwise.evaluation.errors_of_means",
    "text_sha256": "rankwise.evaluation.record",
    "warn_of_empty": "rankwise.evaluation.tasks.base",
    "write_answers": "rankwise.evaluation.tasks.base",
}

__all__ = [
    "Decoding",
    "Engine",
    "EvaluateSettings",
    "Example",
    "Lines",
    "Mean",
    "Question",
    "Summary",
    "Task",
    "TaskResult",
    "TaskType",
    "Tell",
    "error_of_shares",
    "harness_folder",
    "harness_task",
    "mean_of",
    "paired_difference",
    "shares_of_ratio",
    "text_sha256",
    "warn_of_empty",
    "write_answers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
