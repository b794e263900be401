"""The class tree of every error and warning that rankwise raises.

    RankwiseError                   code, message, exit_code
    ├── InputError                  exit 2: the user can correct it
    │   ├── ConfigError             RW1xx  settings, options, YAML
    │   ├── DataError               RW2xx  rows, files, templates, tokens
    │   ├── ModelError              RW3xx  base models: folders, GGUF, weights, devices
    │   ├── AdapterError            RW4xx  targets, adapter files, merging
    │   ├── RunError                RW5xx  output folders, checkpoints, preflight checks; RW7xx several processes
    │   └── QuantizationError       RW6xx  4-bit formats and kernels
    │                               RW7xx  export, serving and other later parts, of the kind that fits
    ├── InternalError               exit 1: a bug in rankwise
    └── Interrupted                 exit 130: stopped by the user, after saving
    RankwiseWarning                 the same codes; the work continues

A code is stable and has an entry in ``docs/errors/``. Imports no torch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Coded(BaseException):
    """What errors and warnings share: a code, and one sentence with what happened, what was found, and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class RankwiseError(Coded, Exception):
    exit_code = 1


class InputError(RankwiseError):
    exit_code = 2


class ConfigError(InputError): ...


class DataError(InputError): ...


class ModelError(InputError): ...


class AdapterError(InputError): ...


class RunError(InputError): ...


class QuantizationError(InputError): ...


class InternalError(RankwiseError): ...


class Interrupted(RankwiseError):
    exit_code = 130


class RankwiseWarning(Coded, UserWarning):
    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}


@contextlib.contextmanager
def heard(tell: Callable[[RankwiseWarning], bool]) -> Iterator[None]:
    """Call ``tell`` with each RankwiseWarning; a warning for which ``tell`` returns True is also shown."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=RankwiseWarning)
        show = warnings.showwarning

        def hear(message: Warning | str, *rest: Any, **named: Any) -> None:
            if not isinstance(message, RankwiseWarning) or tell(message):
                show(message, *rest, **named)

        warnings.showwarning = hear
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means out of memory: torch's OutOfMemoryError, MemoryError, or torch's CPU allocator's."""
    cpu_allocator = "DefaultCPUAllocator" in str(error) and "memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or cpu_allocator


def one_line(error: BaseException) -> str:
    """Up to 300 characters of an error of the system or another library on one line, for use inside a sentence."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(reason.split())[:300].rstrip(".:;") or type(error).__name__


def out_of_memory(error: BaseException, changes: str | None = None) -> RunError:
    """RunError RW550. ``changes``: the settings that would fit, if they are known."""
    usual = "lower --batch-size or --max-length, or switch on --gradient-checkpointing"
    remedy = f"what would fit, the cheapest first: {changes}" if changes else usual
    return RunError("RW550", f"the memory of the device is full ({one_line(error)}); {remedy}.")


def warn(code: str, message: str, *, stacklevel: int = 2) -> None:
    """Report a problem that does not stop the work. The command line prints it; Python code can filter it."""
    warnings.warn(RankwiseWarning(code, message), stacklevel=stacklevel + 1)


def some_of(items: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """The first ``limit`` of ``items``, and the number of the others."""
    listed = list(items)
    shown = separator.join(listed[:limit])
    if len(listed) <= limit:
        return shown
    joint = " and " if separator == ", " else f"{separator}and "
    return f"{shown}{joint}{len(listed) - limit:,} more"
