"""Fork the steps of a comparison from a process that has imported the libraries, so that they start at once.

Importing torch, transformers and trl takes most of the time of a short step. Python's fork server imports them once
and forks for every step; each step is still a separate process with its own memory, exit code and lock. The server
computes nothing, since a process that has used OpenMP threads or a GPU must not fork.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.planning.hardware import this_machine

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

# The modules that the steps import; none of them probes for a GPU.
PRELOADED = ("rankwise.cli.main", "rankwise.comparison.measure", "rankwise.comparison.prepare", "rankwise.training.run")


def takes(module: str) -> bool:
    """Whether steps of ``module`` are forked: on Linux without a GPU, since CUDA does not survive a fork."""
    return module in PRELOADED and sys.platform == "linux" and this_machine().device_type == "cpu"


@functools.cache
def _server() -> ForkServerContext:
    """The context of Python's fork server, which is running on return."""
    # Not every system has this module.
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    kept = os.dup(2)
    # Output of imports belongs to no step.
    _redirect(Path(os.devnull), 0, 2)
    try:
        forkserver.ensure_running()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    return context


class Forked:
    """A step in progress, with the part of ``subprocess.Popen`` that a comparison needs."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        files: tuple[Path, Path, Path],
        environment: Mapping[str, str],
        prepare: Callable[[], None],
    ) -> None:
        """``files``: stdout, stderr (appended to), and the lock. On return all exist and the lock is held.

        Raises OSError where a file cannot be opened.
        """
        server = _server()
        ready, told = server.Pipe(duplex=False)
        surroundings = {**os.environ, **environment}
        # A daemon process: if this process ends early, the step gets SIGTERM, saves and ends.
        self._process = server.Process(
            target=_work, args=(module, arguments, files, surroundings, os.getcwd(), told, prepare), daemon=True
        )
        self._process.start()
        told.close()
        with ready, contextlib.suppress(EOFError):
            if (fault := ready.recv()) is not None:
                raise OSError(*fault)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired where the step still runs after ``timeout`` seconds."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("a step of the comparison", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


def _work(
    module: str,
    arguments: Sequence[str],
    files: tuple[Path, Path, Path],
    environment: Mapping[str, str],
    folder: str,
    told: Connection,
    prepare: Callable[[], None],
) -> None:
    import fcntl

    # The server's objects live on: the garbage collector should not scan them, which would copy their pages.
    gc.freeze()
    os.setsid()
    # SIGINT ends this process until the step begins.
    prepare()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out, log, lock = files
    try:
        held = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        fcntl.flock(held, fcntl.LOCK_EX)
        _redirect(out, os.O_TRUNC, 1)
        _redirect(log, os.O_APPEND, 2)
    except OSError as error:
        told.send((error.errno, error.strerror, str(error.filename or lock)))
        sys.exit(1)
    told.send(None)
    told.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "OMP_NUM_THREADS" in environment:
        import torch

        # OpenMP read the variable when it was loaded, which was in the server.
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        # Python's default handler.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        step = importlib.import_module(module)
        code = step.main(list(arguments))
        # The work is done; a request to stop has no effect.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        # An uncaught KeyboardInterrupt would end a child of the fork server with code 1 instead of by the signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(code)


def _end_with_parent() -> None:
    """Send SIGTERM to this step once the process that started it is gone. The server lives as long as its steps."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _redirect(file: Path, how: int, number: int) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | how)
    os.dup2(handle, number)
    os.close(handle)
