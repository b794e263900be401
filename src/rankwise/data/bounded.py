"""Run chat templates with bounded time and memory. They are untrusted programs, and Jinja's sandbox limits neither."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rankwise.errors import DataError
from rankwise.foreign import Json, JsonObject

# CPU time (independent of the machine's load) for a template: a constant, and more for each item and byte.
SECONDS, SECONDS_AN_ITEM, SECONDS_A_BYTE = 5, 0.02, 5e-7
# Address space in addition to that of the process, which a fork shares.
MEMORY_BYTES = 1 << 30
# An exit status that neither a signal nor an error of Python gives.
OUT_OF_MEMORY = 77


def bounded(items: Callable[[], Iterator[Json]], place: Callable[[int], str]) -> Iterator[Any]:
    """Yield the JSON values of ``items()``, computed in a forked process with limits of time and memory.

    Only a process can be stopped in the middle of ``10**10**8``. A forked process needs no imports and no input.
    Systems without fork (Windows) have no limits. ``place(n)`` names item ``n`` in messages.

    Raises DataError as ``items`` does, and RW225 where a limit is reached.
    """
    if not hasattr(os, "fork"):
        yield from items()
        return
    reader, writer = os.pipe()
    child = _fork()
    if child == 0:
        os.close(reader)
        _serve(items, writer)
    os.close(writer)
    made, status = 0, 0
    try:
        with open(reader, "rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield _item(json.loads(line))
                    made += 1
        status = os.waitpid(child, 0)[1]
        child = 0
    finally:
        if child:
            # The caller stopped iterating, or an item was an error.
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if status:
        remedy = "give another template by --chat-template FILE, or split a conversation of very many messages"
        raise DataError("RW225", f"{place(made)}: {_excess(status)}; {remedy}.")


def _fork() -> int:
    # Tokenizers warn of a fork unless this is set. The child tokenizes nothing.
    named = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = named or "true"
    # Python discards exceptions that signal handlers raise inside fork hooks, so signals are blocked meanwhile.
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        with warnings.catch_warnings():
            # Python warns of forks in a process with threads, whose locks stay locked. Templates take no locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            return os.fork()
    except OSError as error:
        raise DataError("RW225", f"cannot start a process for the chat template: {error.strerror}.") from None
    finally:
        # In the child too, where nothing reads it.
        if named is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _serve(items: Callable[[], Iterator[Json]], writer: int) -> NoReturn:
    """The child process: write one line per item, and exit without the parent's cleanup."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _limit()
        with open(writer, "wb") as stream:
            allowed: float = SECONDS
            for message in _messages(items):
                allowed += SECONDS_AN_ITEM + SECONDS_A_BYTE * stream.write(json.dumps(message).encode() + b"\n")
                # At once: the number of lines says which item was the last.
                stream.flush()
                used = os.times()
                signal.setitimer(signal.ITIMER_PROF, max(0.01, allowed - used.user - used.system))
        status = 0
    except MemoryError:
        status = OUT_OF_MEMORY
    finally:
        os._exit(status)


def _messages(items: Callable[[], Iterator[Json]]) -> Iterator[JsonObject]:
    try:
        for item in items():
            yield {"item": item}
    except DataError as error:
        yield {"error": (error.code, error.message)}
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  reported by the parent
        yield {"fault": traceback.format_exc()}


def _item(message: JsonObject) -> Any:
    if "error" in message:
        raise DataError(*message["error"])
    if "fault" in message:
        raise RuntimeError(f"in the process that renders chat templates:\n{message['fault']}")
    return message["item"]


def _limit() -> None:
    """SIGPROF ends this process when its CPU time is used up, and allocations above the memory limit fail."""
    import resource

    # A garbage collection would touch, and so copy, the parent's memory.
    gc.freeze()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    # macOS has neither this file nor such a limit; there only the length of the text is bounded.
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + MEMORY_BYTES
        known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), hard))


def _excess(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGPROF:
            return f"the chat template takes more than {SECONDS} seconds of processor time for it"
        return f"the chat template ended its process by {signal.Signals(number).name}"
    if os.WEXITSTATUS(status) == OUT_OF_MEMORY:
        return f"the chat template takes more than {MEMORY_BYTES >> 30} GiB of memory for it"
    return "the process of the chat template ended without a result"
