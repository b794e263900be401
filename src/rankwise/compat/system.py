"""What Linux, macOS and Windows do differently: locks, renames, flushing, signals, processes, names, memory, threads.

Each function reads ``WINDOWS`` when it is called, so that the tests run its branches for Windows on any system. Imports
no torch.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WINDOWS = os.name == "nt"
# How a parent asks a process to save and end, and every signal that asks so: of a terminal, of a service manager and,
# on Windows, the only one that a parent can send.
ASK_TO_STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
# Minus the exit code of a process that was killed; Windows has the number, and not the signal.
KILLED = 9
# Of os.open: no symbolic link is followed. A link takes rights on Windows that few users have.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
# Seconds between attempts to rename. A virus scanner or an indexer has a new file open for a moment, and Windows
# renames nothing onto an open file.
PAUSES = (0.01, 0.03, 0.1, 0.3, 1.0)
# Linux's prctl option for the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1
# The variables in which a user says how OpenMP's threads wait, and how often it is asked who else needs their cores.
WAIT_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
WATCH_SECONDS = 1.0
# Cores that others may use, beside what they leave free, before waiting threads sleep.
SPARED_CORES = 0.2
# The time of the cores that a container may use, and in which time, in microseconds.
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d) *(\..*)?|.*[<>:\"|?*\x00-\x1f].*|.*[. ]")


def lock(handle: int) -> None:
    """Lock an open file until the handle is closed. Raises BlockingIOError where another handle has the lock."""
    if WINDOWS:
        msvcrt: Any = importlib.import_module("msvcrt")
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from None
        return
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock(handle: int, file: Path) -> None:
    """Release a lock and remove its file: before the release, so that nobody locks a file that goes away. Windows
    removes no open file: there it stays if another process has opened it meanwhile."""
    try:
        if not WINDOWS:
            with contextlib.suppress(OSError):
                file.unlink()
    finally:
        os.close(handle)
    if WINDOWS:
        with contextlib.suppress(OSError):
            file.unlink()


def rename(source: Path, target: Path) -> None:
    """Put a file or a folder in the place of ``target``, which may be a file or an empty folder."""
    for pause in PAUSES if WINDOWS else ():
        try:
            if target.is_dir():
                target.rmdir()
            return os.replace(source, target)
        except PermissionError:
            time.sleep(pause)
    return os.replace(source, target)


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk. Windows keeps the entries of folders by itself."""
    if WINDOWS and path.is_dir():
        return
    # Windows flushes only what could be written to.
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reserved_name(path: Path) -> str | None:
    """The part of a path that cannot be a name on Windows, such as ``aux`` or ``a:b``; None where all can, and on
    other systems."""
    parts = path.parts[1:] if path.anchor else path.parts
    return next((part for part in parts if part != ".." and RESERVED.fullmatch(part)), None) if WINDOWS else None


def child_options() -> dict[str, Any]:
    """Options of ``subprocess.Popen`` for a process that gets no signals of the terminal, ends with its parent where
    the system has a way (Linux), and stops at ``ASK_TO_STOP``."""
    if WINDOWS:
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200)}
    return {"start_new_session": True, "preexec_fn": _prepare_child}


def _prepare_child() -> None:
    # Background jobs of a shell ignore SIGINT, with which a run is asked to stop.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def end_with_parent() -> None:
    """Let this process get SIGTERM, with which a run saves its step, when its parent dies. Has an effect on Linux."""
    if sys.platform == "linux":
        # Few processes need it, and this module is imported for every --help.
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def speak_utf8() -> None:
    """Let the standard streams take every character: as UTF-8 on Windows, where a pipe or a file has the system's code
    page, and with escapes for what the encoding lacks, such as a file name that is not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8" if WINDOWS else None, errors="backslashreplace")


def cache_folder() -> Path:
    """The folder for the user's caches on this system."""
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / "rankwise"
    local = os.environ.get("LOCALAPPDATA") if WINDOWS else None
    return Path(os.environ.get("XDG_CACHE_HOME") or local or Path.home() / ".cache") / "rankwise"


def glibc() -> Any | None:
    """The C library, to call functions that only glibc has; None where it is a different one."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return None
    import ctypes

    return ctypes.CDLL(None)


def anonymous_memory_bytes() -> int:
    """The memory of this process in bytes that lies in no file: on Linux what is resident of it, on macOS what would be
    free without the process, on Windows what is committed."""
    status = Path(f"/proc/{os.getpid()}/status")
    found = re.search(r"RssAnon:\s*(\d+)", status.read_text(encoding="utf-8")) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    import psutil

    process: Any = psutil.Process()
    return int(process.memory_info().private if WINDOWS else process.memory_full_info().uss)


def share_cores(openmp: Any, threads: Callable[[], int]) -> None:
    """Let waiting threads of GNU's ``openmp``, of which ``threads()`` compute, sleep soon while other programs need
    their cores, as a thread of its own finds on Linux. Does nothing where the user says how threads wait.

    A waiting thread spins 300,000 times. Nobody has to wake it, which takes as long as a product of few rows, but its
    core does nothing else. If there are more threads than cores, it spins 100 times: a second, idle team achieves that.
    """
    if sys.platform.startswith("linux") and not any(name in os.environ for name in WAIT_POLICIES):
        threading.Thread(target=_watch_cores, args=(openmp, threads), daemon=True).start()


def _watch_cores(openmp: Any, threads: Callable[[], int]) -> None:
    released: threading.Event | None = None
    at_first = len(os.sched_getaffinity(0))
    try:
        while True:
            # A process can be moved to fewer cores, or get a part of their time.
            cores, began = sorted(os.sched_getaffinity(0)), time.monotonic()
            before = _seconds_of_others(cores)
            threading.Event().wait(WATCH_SECONDS)
            others = (_seconds_of_others(cores) - before) / (time.monotonic() - began)
            is_crowded = threads() > min(len(cores) - others, _granted_cores()) + SPARED_CORES
            if is_crowded and released is None:
                released = threading.Event()
                threading.Thread(target=_second_team, args=(openmp, at_first, released), daemon=True).start()
            elif not is_crowded and released is not None:
                released.set()
                released = None
    except OSError:
        # Without /proc nobody knows.
        return


def _seconds_of_others(cores: Sequence[int]) -> float:
    """The seconds that these cores have computed for other processes."""
    import psutil

    all_cores, own = psutil.cpu_times(percpu=True), os.times()
    busy = [all_cores[core] for core in cores if core < len(all_cores)]
    return sum(one.user + one.nice + one.system + one.irq + one.softirq for one in busy) - own.user - own.system


def _granted_cores() -> float:
    """How many cores' time the control group of a container grants, with ``docker run --cpus``."""
    if not CPU_LIMIT.exists():
        return math.inf
    granted, period = CPU_LIMIT.read_text(encoding="utf-8").split()
    return math.inf if granted == "max" else int(granted) / int(period)


def _second_team(openmp: Any, threads: int, released: threading.Event) -> None:
    """Have a team of so many threads, which end with this one. They do nothing: ``free(NULL)``."""
    import ctypes

    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
    openmp.GOMP_parallel(nothing, None, ctypes.c_uint(threads), ctypes.c_uint(0))
    released.wait()
