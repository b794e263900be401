"""A task of another distribution, as an entry point of ``rankwise.tasks`` would give it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwise.evaluation import Engine, EvaluateSettings, Example, Task, TaskType, Tell
from rankwise.evaluation.tasks import names
from rankwise.foreign import JsonObject
from rankwise.options import Count, Settings


class LengthOptions(Settings):
    longest: Count = 100
    unused: int = 0


class Lengths(Task):
    """The length of each line of a file, which asks the model nothing."""

    name = "lengths"
    primary = "accuracy"
    higher_is_better = {"accuracy": True}  # noqa: RUF012  read-only

    def __init__(self, data: str, limit: int | None, longest: int) -> None:
        self.text, self.longest = Path(data).read_text(encoding="utf-8"), longest
        self.lines = self.text.splitlines()[:limit]

    def describe(self) -> JsonObject:
        return {"longest": self.longest}

    @property
    def data_sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        scores = ({"accuracy": float(len(line) <= self.longest)} for line in self.lines)
        return [
            Example(id=str(number), prompt=line, prediction="", scores=score)
            for number, (line, score) in enumerate(zip(self.lines, scores))
        ]


def _make(name: str, settings: EvaluateSettings, options: LengthOptions) -> Task:
    return Lengths(settings.data_of(name) or "", settings.limit, options.longest)


def _uses(name: str, settings: EvaluateSettings, options: Any) -> Sequence[str]:
    return ("longest", "num_fewshot")


LENGTHS = TaskType(_make, LengthOptions, _uses, "a file of lines")


def install(patch: pytest.MonkeyPatch) -> None:
    """``lengths`` as the only installed task of another distribution."""
    patch.setattr(names, "entries", lambda: {"lengths": SimpleNamespace(load=lambda: LENGTHS)})
