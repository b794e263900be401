"""Ctrl-C and SIGTERM: in training, the first signal ends the run after the current step and saves it, the second ends
it at once."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Linux's prctl option for the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1


class Interrupt:
    """Whether the user has asked to stop. ``say`` confirms the first signal."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.requested = False
        self.say = say

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # A signal may come while a line is being printed, when Python refuses to print another one.
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
