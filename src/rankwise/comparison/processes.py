"""One process for each step of a run. Its output goes to files, it ends with its parent, and it locks its folder."""

from __future__ import annotations

import contextlib
import ctypes
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

# Linux's prctl: which signal a process gets when its parent dies.
PR_SET_PDEATHSIG = 1
# In place of an exit code: the machine on which the step ran is gone.
LOST = -1000


def check_system() -> None:
    """Raise RunError (RW599) where files have no locks, and processes no signals, as POSIX knows them."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise RunError(
            "RW599",
            f"rankwise compare starts and stops its runs as POSIX systems do, and this one ({sys.platform}) is none; "
            "use Linux, macOS, or the Windows Subsystem for Linux (WSL).",
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
        """The JSON document that it printed; empty if it did not come that far."""
        return document_in(self.stdout)


def document_in(stdout: Path) -> JsonObject:
    """The JSON document in the output of a step; empty if it did not come that far."""
    try:
        found = json.loads(stdout.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def start(module: str, arguments: Sequence[str], name: Path, environment: Mapping[str, str]) -> Worker:
    """Start ``python -m module arguments``. stdout goes to ``NAME.out``; stderr is appended to ``NAME.log``.

    The process holds the lock of ``NAME.lock`` and receives no signals of the terminal: its parent decides when it
    stops. Where that is possible, it is forked off a process that has loaded the libraries.
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
    # Our copy of the lock is closed; the process's own keeps it.
    return Worker(process, time.monotonic(), stdout)


def is_locked(name: Path) -> bool:
    """Whether a process of an earlier call is still working on it."""
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
    # A shell's background jobs ignore SIGINT, by which a run is asked to stop.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        # SIGTERM, not SIGKILL: a run saves its step and ends.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
