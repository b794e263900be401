"""The library that lets calls of the disk fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from shim import build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = build(tmp_path_factory.mktemp("shim"))
    if isinstance(found, str):
        pytest.skip(found)
    return found
