"""The steps of a comparison in this process: what they import is there, which takes seconds in a new one."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from rankwise.comparison import pool
from rankwise.comparison.stages import beside


def steps_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Comparisons start no processes any more."""

    def start(module: str, arguments: Sequence[str], name: Path, environment: Mapping[str, str]) -> pool.Call:
        with beside(name, ".out").open("w") as out, contextlib.redirect_stdout(out), warnings.catch_warnings():
            # Its warnings are its own: a process would have printed them.
            warnings.showwarning = lambda *_, **__: None
            code = importlib.import_module(module).main(list(arguments))
        return pool.Call(lambda: code, lambda: None)

    patch.setattr(pool, "start", start)
