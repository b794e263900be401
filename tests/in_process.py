"""The steps of a comparison in this process: what they import is there, which takes seconds in a new one."""

from __future__ import annotations

import contextlib
import importlib
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwise.comparison import processes
from rankwise.comparison.stages import beside


def steps_in_this_process(patch: pytest.MonkeyPatch, *, but: Sequence[str] = ()) -> None:
    """Comparisons start no processes any more, except for steps whose arguments begin with a word of ``but``."""
    in_new_one = processes.start

    def start(module: str, arguments: Sequence[str], name: Path, environment: Mapping[str, str]) -> Any:
        if arguments[0] in but:
            return in_new_one(module, arguments, name, environment)
        began, stdout = time.monotonic(), beside(name, ".out")
        with stdout.open("w") as out, contextlib.redirect_stdout(out), warnings.catch_warnings():
            # Its warnings are its own: a process would have printed them.
            warnings.showwarning = lambda *_, **__: None
            code = importlib.import_module(module).main(list(arguments))
        return processes.Worker(SimpleNamespace(poll=lambda: code), began, stdout)  # type: ignore[arg-type]

    patch.setattr(processes, "start", start)
