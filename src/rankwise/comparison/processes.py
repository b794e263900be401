"""One process for each step of a run. Its output goes to files, it ends with its parent, and it locks its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from rankwise.comparison import warm
from rankwise.comparison.stages import beside
from rankwise.errors import RunError
from rankwise.foreign import JsonObject
from rankwise.training.interrupt import end_with_parent

# Stands for the exit code of a step whose machine is gone.
LOST = -1000


def check_system() -> None:
    """Raise RunError (RW599) on a system without POSIX file locks and signals."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise RunError(
            "RW599",
            f"rankwise compare needs the file locks and signals of POSIX, which this system ({sys.platform}) does not "
            "have; use Linux, macOS, or the Windows Subsystem for Linux (WSL).",
        ) from None


@dataclasses.dataclass
class Worker:
    """A running process. Its exit code is negative where a signal ended it."""

    process: subprocess.Popen[bytes] | warm.Forked
    started: float
    stdout: Path

    def poll(self) -> int | None:
        return self.process.poll()

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def stop(self) -> None:
        """Ask the process to save and exit, as Ctrl-C would."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def document(self) -> JsonObject:
        """The JSON document that the process printed; empty where it printed none."""
        return document_in(self.stdout)


def document_in(stdout: Path) -> JsonObject:
    """The JSON document in the output of a step; empty where there is none."""
    try:
        found = json.loads(stdout.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def start(module: str, arguments: Sequence[str], name: Path, environment: Mapping[str, str]) -> Worker:
    """Start ``python -m module arguments``. stdout goes to ``NAME.out``; stderr is appended to ``NAME.log``.

    The process holds the lock of ``NAME.lock`` and gets no signals from the terminal: its parent decides when it stops.
    Where possible, it is forked from a process that has loaded the libraries.
    """
    import fcntl

    name.parent.mkdir(parents=True, exist_ok=True)
    stdout = beside(name, ".out")
    if warm.takes(module):
        files = (stdout, beside(name, ".log"), beside(name, ".lock"))
        return Worker(warm.Forked(module, arguments, files, environment, _prepare), time.monotonic(), stdout)
    with open(stdout, "wb") as out, open(beside(name, ".log"), "ab") as log, _lock_file(name) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env={**os.environ, **environment},
            pass_fds=(lock.fileno(),),
            start_new_session=True,
            preexec_fn=_prepare,
        )
    # This process closes its copy of the lock; the started process keeps the lock.
    return Worker(process, time.monotonic(), stdout)


def is_locked(name: Path) -> bool:
    """Whether a process of an earlier call still holds the lock of ``NAME.lock``."""
    import fcntl

    with _lock_file(name) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock_file(name: Path) -> IO[bytes]:
    return open(beside(name, ".lock"), "ab")


def _prepare() -> None:
    # Background jobs of a shell ignore SIGINT, with which a run is asked to stop.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
