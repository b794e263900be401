"""Fixtures that every part uses: a tiny Llama, a tiny GPT-2, and the project's shared data where it is present."""

from __future__ import annotations

import gc
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from marks import LEVELS
from rankwise.ops.cpu import native
from rankwise.reports.plots import loss_svg
from tiny_models import tiny_gpt2, tiny_llama

SHARED = Path(os.environ.get("RANKWISE_SHARED", Path(__file__).parents[2] / "shared"))

CHROMIUM_ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: what starts last should be short, or one worker waits for the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish() -> None:
    # Triton's bindings complain of what is left at the end.
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _few_to_look_through() -> None:
    """Leave what is loaded out of later collections. Every training run makes one, and it took half of a short run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_flushing() -> Iterator[None]:
    """Without fsync, which took a fifth of a short run: what tests write need not outlive this machine."""
    with patch.object(os, "fsync", lambda handle: None):
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_curve() -> Iterator[None]:
    """The first ``loss.svg`` is taken for all: to draw it took a seventh of a short run. Tests of plots draw them."""
    first: list[str] = []

    def drawn(*given: Any, **more: Any) -> str:
        first[:] = first or [loss_svg(*given, **more)]
        return first[0]

    with patch("rankwise.training.session.loss_svg", drawn):
        yield


@pytest.fixture(scope="session", autouse=True)
def _cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of their own for the tests, which prepared bases would fill."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; tests that look at a page are skipped where it or its package is absent."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    program = os.environ.get("RANKWISE_CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no program `chromium`; install Debian's package or set RANKWISE_CHROMIUM")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=program, args=CHROMIUM_ARGUMENTS.split())
        yield opened
        opened.close()


@pytest.fixture
def shared() -> Path:
    """The folder with real data and reference results; tests that need it are skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no reference data at {SHARED}; set RANKWISE_SHARED to its folder")
    return SHARED / "data"


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return tiny_gpt2()


def at_level(name: str | None) -> Iterator[str | None]:
    before = native.level() if name else None
    if name:
        native.set_level(name)
    yield name
    if before:
        native.set_level(before)


@pytest.fixture(params=LEVELS or (None,))
def level(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Each instruction set of the native library that this processor has, or None once where there is no library."""
    yield from at_level(request.param)


@pytest.fixture
def some_level(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """One of these, another for each case of a table."""
    levels = LEVELS or (None,)
    yield from at_level(levels[zlib.crc32(request.node.nodeid.encode()) % len(levels)])


@pytest.fixture
def avx2() -> Iterator[str | None]:
    """The native library as on a processor with AVX2 and no more."""
    yield from at_level("avx2")
