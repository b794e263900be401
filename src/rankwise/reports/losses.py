"""The losses of one run, as its ``metrics.jsonl`` holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from rankwise.foreign import Fields
from rankwise.reports.numbers import is_number

Point = tuple[float, float]

# What the losses of a run are, by its objective. Those of the others are means over answers or pairs.
NAMES = {"sft": "loss per token", "grpo": "loss; of evaluations the negative mean reward"}


def loss_name(objective: str) -> str:
    return NAMES.get(objective, "loss")


@dataclasses.dataclass(frozen=True)
class Losses:
    """The (step, loss) pairs of the training log and of the evaluations."""

    training: Sequence[Point]
    evaluation: Sequence[Point]
    kept_step: int | None = None

    @classmethod
    def of(cls, lines: Iterable[Fields], kept_step: int | None = None) -> Losses:
        """The losses of a run's metrics. Lines without a step or without a finite loss are ignored."""
        rows = list(lines)
        return cls(points_of(rows, "loss"), points_of(rows, "eval_loss"), kept_step)

    @property
    def smooth(self) -> list[Point]:
        values = smoothed([loss for _, loss in self.training], len(self.training) / 12)
        return [(step, value) for (step, _), value in zip(self.training, values)]

    @property
    def best(self) -> Point | None:
        """The evaluation of the kept step, else the lowest one after the start."""
        trained = [point for point in self.evaluation if point[0] > 0]
        chosen = [point for point in trained if point[0] == self.kept_step]
        return next(iter(chosen), min(trained, key=lambda point: point[1], default=None))

    @property
    def last_step(self) -> float:
        return max((step for step, _ in [*self.training, *self.evaluation]), default=1)


def points_of(rows: Iterable[Fields], key: str) -> list[Point]:
    """The (step, value) pairs of ``key``. Lines without a step or without a finite value are left out."""
    found = [(row.get("step"), row.get(key)) for row in rows]
    return [(float(step), float(value)) for step, value in found if is_number(step) and is_number(value)]


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """An exponential moving average over about ``span`` values, corrected for its start."""
    keep = 1 - 2 / (max(span, 1.0) + 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result
