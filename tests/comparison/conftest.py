"""Comparisons whose steps are stand-ins (``fake_stage.py``)."""

from __future__ import annotations

import os

import pytest

from in_process import steps_in_this_process
from rankwise import config
from rankwise.comparison import run, stages
from rankwise.methods import METHODS


@pytest.fixture(autouse=True)
def _methods_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "is_known", lambda name: name in (*METHODS, "bottleneck", "prefix"))


@pytest.fixture
def real_processes() -> None: ...


@pytest.fixture
def quick_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run in this process, except in tests that ask for ``real_processes``."""
    if "real_processes" not in request.fixturenames:
        steps_in_this_process(monkeypatch)


@pytest.fixture
def real_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were, after what ``fake_comparison.compare`` sets."""
    for module, name in ((stages, "CLI"), (stages, "STEPS"), (run, "environments")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
