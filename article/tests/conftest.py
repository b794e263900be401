"""The shared data of the project where they are present, and quick tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

SHARED = Path(os.environ.get("RANKWISE_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.fixture(scope="session", autouse=True)
def _no_flushing() -> Iterator[None]:
    """Without fsync: what tests write need not outlive this machine."""
    with patch.object(os, "fsync", lambda handle: None):
        yield


@pytest.fixture
def shared() -> Path:
    """The folder with real data and reference results; tests that need it are skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no reference data at {SHARED}; set RANKWISE_SHARED to its folder")
    return SHARED / "data"
