"""The interface by which a run reports its progress, for example to the command line. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInfo:
    """One finished optimizer step."""

    step: int
    total: int
    # Mean over the trained tokens of this step.
    loss: float
    # Non-padding tokens divided by the seconds of the training steps, since the run started or was resumed.
    tokens_per_second: float
    # Memory in use now; peak_memory_bytes is the most so far.
    memory_bytes: int
    peak_memory_bytes: int
    # 2-norm of the gradients before clipping.
    grad_norm: float | None
    learning_rate: float
    # 2-norm of all B matrices together at the last logged step, a measure of the update; None without an adapter.
    b_norm: float | None
    seconds_left: float
    # {name: figure} of the objective, such as the mean reward of the step's answers.
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Observer(Protocol):
    """Receives the events of a run. Every call comes from the training thread, so calls must be short."""

    def phase(self, text: str) -> None:
        """A new phase begins: ``Reading data``, ``Training``, ..."""

    def note(self, text: str) -> None:
        """A line to keep, such as a default that was chosen."""

    def step(self, info: StepInfo) -> None:
        """An optimizer step is done."""

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        """The evaluation loss (mean over tokens) after ``step``, and whether it is the lowest so far."""

    def sample(self, step: int, text: str) -> None:
        """The answer to the fixed sample prompt, after the evaluation of ``step``."""

    def warning(self, code: str, text: str) -> None:
        """A problem that does not stop the run."""


class SilentObserver:
    """Shows nothing."""

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def step(self, info: StepInfo) -> None: ...

    def evaluation(self, step: int, loss: float, best: bool) -> None: ...

    def sample(self, step: int, text: str) -> None: ...

    def warning(self, code: str, text: str) -> None: ...
