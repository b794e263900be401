"""What a release is made of: the version from the tag, a wheel that lacks nothing, the files that hosts read."""

from __future__ import annotations

import re
import runpy
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
import yaml

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


def test_wheels_are_built_with_everything_in_them():
    wheels = PROJECT["tool"]["cibuildwheel"]
    assert wheels["environment"] == {"RANKWISE_REQUIRE_NATIVE": "1"}
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    assert any("cibuildwheel" in step.get("uses", "") for step in workflow["jobs"]["wheels"]["steps"])


def test_an_archive_of_the_source_can_be_built_from():
    """What setup.py reads is in the list of files that git knows, or is named in MANIFEST.in."""
    named = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    for needed in ("csrc",):
        assert needed in named
    pruned = re.findall(r"^prune (.+)$", named, re.MULTILINE)
    assert all((ROOT / folder).is_dir() for folder in pruned)


def test_the_citation_is_one():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["license"] == PROJECT["project"]["license"]


@pytest.mark.parametrize("form", ["bug", "wish"])
def test_issue_forms_have_what_the_host_asks_for(form):
    content = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(content)
    ids = [part["id"] for part in content["body"]]
    assert len(ids) == len(set(ids))
    assert all(part["attributes"]["label"] for part in content["body"])


def test_the_tree_is_clean_of_build_outputs():
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert not [name for name in known if name.endswith((".so", ".whl", ".tar.gz"))]
