"""Between a run and its user: the observer, which is told of every step, and the signals that stop a run.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

# Linux's prctl option for the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1


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

    def warning(self, code: str, text: str) -> None:
        """A problem that does not stop the run."""


class SilentObserver:
    """Shows nothing."""

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def step(self, info: StepInfo) -> None: ...

    def evaluation(self, step: int, loss: float, best: bool) -> None: ...

    def warning(self, code: str, text: str) -> None: ...


class Interrupt:
    """Whether the user has asked to stop. ``say`` confirms the first signal."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.requested = False
        self.say = say

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # A signal may come while a line is being printed, when Python refuses to print a second one.
        with contextlib.suppress(RuntimeError):
            self.say("Stopping after this step (a second time: at once)")


def end_with_parent() -> None:
    """Let this process get SIGTERM, with which a run saves its step, when its parent dies. Has an effect on Linux."""
    if sys.platform == "linux":
        # Few processes need it, and this module is imported for every --help.
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def terminable() -> Iterator[None]:
    """A context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that temporary files are removed."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        # A handler that was set meanwhile stays.
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def interrupts(interrupt: Interrupt) -> Iterator[Interrupt]:
    """A context in which both signals are passed to ``interrupt``. Only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupt.handle) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
