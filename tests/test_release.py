"""What a release is made of: the version from the tag, a wheel that lacks nothing, the files that hosts read."""

from __future__ import annotations

import contextlib
import re
import runpy
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import setuptools

import rankwise
from rankwise.ops.cpu import native

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_that_of_what_is_installed():
    assert rankwise.__version__ == metadata.version("rankwise")
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "setuptools-scm" in " ".join(PROJECT["build-system"]["requires"])


def commands(monkeypatch, strict: bool):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    if strict:
        monkeypatch.setenv("RANKWISE_REQUIRE_NATIVE", "1")
    else:
        monkeypatch.delenv("RANKWISE_REQUIRE_NATIVE", raising=False)
    return runpy.run_path("setup.py")["commands"]["build_ext"]


@pytest.mark.parametrize("strict", [False, True])
def test_without_a_compiler_a_release_fails_and_an_install_does_not(strict, monkeypatch):
    build = commands(monkeypatch, strict)(setuptools.Distribution({"name": "rankwise"}))
    said = []
    monkeypatch.setattr(build, "warn", said.append)
    build.compiler = type("NoCompiler", (), {"compiler_type": "msvc"})()
    if strict:
        with pytest.raises(RuntimeError, match="GCC's options"):
            build.build_extension(setuptools.Extension("rankwise.ops.cpu._native", []))
    else:
        build.build_extension(setuptools.Extension("rankwise.ops.cpu._native", []))
        assert "were not built" in said[0]


def test_an_archive_of_the_source_can_be_built_from():
    """What setup.py reads is in the list of files that git knows, or is named in MANIFEST.in."""
    named = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    for needed in ("csrc",):
        assert needed in named
    pruned = re.findall(r"^prune (.+)$", named, re.MULTILINE)
    assert all((ROOT / folder).is_dir() for folder in pruned)


@pytest.fixture
def wheels() -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "dev" / "wheels.py")))


def test_every_platform_has_a_target_and_its_system(wheels: Any) -> None:
    assert list(wheels.targets_of_setup()) == list(runpy_targets())
    for platform in wheels.targets_of_setup():
        assert any(platform.startswith(system) for system in wheels.SYSTEM)


def runpy_targets() -> dict[str, str]:
    with patch.object(setuptools, "setup"), contextlib.chdir(ROOT):
        return runpy.run_path("setup.py")["TARGETS"]


FAULTS = {
    "tag": "its tag is not",
    "licence": "the licence is missing",
    "import library": "its binary files are",
    "size": "more than",
    "path": "names a path of the build, /tmp/pip-x/",
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_wheel_is_refused_for_each_fault(fault: str | None, wheels: Any, tmp_path: Path) -> None:
    platform = "win_amd64"
    wheel = tmp_path / f"rankwise-1-py3-none-{'any' if fault == 'tag' else platform}.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        if fault != "licence":
            made.writestr("rankwise-1.dist-info/licenses/LICENSE", "")
        if fault == "import library":
            made.writestr("rankwise/ops/cpu/native.lib", "")
        content = b"\0" * (wheels.MOST_BYTES + 1 if fault == "size" else 9)
        made.writestr("rankwise/ops/cpu/_native.dll", content + (b"/tmp/pip-x/a" if fault == "path" else b""))
    with patch.dict(wheels.check.__globals__, check_library=lambda data, platform: iter(())):
        problems = list(wheels.check(wheel, platform))
    assert len(problems) == (fault is not None)
    assert fault is None or FAULTS[fault] in problems[0]


@pytest.mark.skipif(sys.platform != "linux" or native.obstacle() is not None, reason="needs the library of Linux")
def test_what_the_built_library_exports_is_its_header(wheels: Any) -> None:
    pytest.importorskip("lief", reason="comes with `make wheels`")
    problems = " ".join(wheels.check_library(native.library_path().read_bytes(), "manylinux_2_28_x86_64"))
    assert "exports" not in problems
