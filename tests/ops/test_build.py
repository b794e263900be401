"""The package's own build: with a compiler, without one, and under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.ops.cpu import native

ROOT = Path(__file__).parents[2]
SANITIZE = ROOT / "csrc" / "sanitize" / "run.sh"

needs_source = pytest.mark.skipif(not SANITIZE.exists(), reason="needs the source tree")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("x")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "src" / "rankwise" / "ops" / "cpu").mkdir(parents=True)
    (folder / "src" / "rankwise" / "__init__.py").write_text("")
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_source
def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path: Path) -> None:
    done = build(tmp_path, CC="/nonexistent", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "install a C++17 compiler" in done.stdout + done.stderr
    assert not list(tmp_path.glob("src/rankwise/ops/cpu/_native*"))


@needs_source
@pytest.mark.long
def test_with_a_compiler_the_library_lies_in_the_package(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("src/rankwise/ops/cpu/_native*"))) == 1


@needs_source
def test_where_a_compiler_is_the_library_is_installed() -> None:
    """The tests of the native library are skipped without one; this one says when that would hide a broken build."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    assert native.obstacle() is None


@needs_source
@pytest.mark.long
def test_clean_under_the_sanitizers(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    done = subprocess.run([str(SANITIZE), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "level 0" in done.stdout
