"""What a release is made of: the version from the tag, a wheel that lacks nothing, the files that hosts read."""

from __future__ import annotations

import re
import runpy
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import setuptools

import rankwise

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
