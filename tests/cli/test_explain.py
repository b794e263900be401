"""``rankwise explain``: the page of errors, by code."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools
from setuptools.dist import Distribution

from rankwise.cli.explain import read_sections

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"


@pytest.mark.parametrize("given", ["RW203", "203", "rw203", " RW203: ", "docs/errors.md#rw203"])
def test_a_code_has_its_section_printed(given, rankwise):
    done = rankwise("explain", given)
    assert done.code == 0
    title, text = read_sections()["RW203"]
    assert done.stdout.split() == f"RW203: {title} {text.replace('**', '')}".split()


def test_every_section_of_the_page_is_found_whole():
    sections = read_sections()
    page = PAGE.read_text(encoding="utf-8")
    assert len(sections) == page.count("\n### RW")
    for code, (title, text) in sections.items():
        start = page.index(f"### {code} — {title}\n\n{text}\n")
        following = page[start:].removeprefix(f"### {code} — {title}\n\n{text}\n")
        assert "\n\n**What to do.** " in text
        assert not following.strip() or following.lstrip().startswith(("<a id", "## "))


def test_with_json_the_section_is_a_document(rankwise):
    found = rankwise("explain", "rw203", "--json").document
    assert found["code"] == "RW203"
    assert (found["title"], found["text"]) == read_sections()["RW203"]


@pytest.mark.parametrize(
    ("given", "said"),
    [("RW2030", "RW203 ("), ("no code", "codes lie between RW101 and RW900"), ("", "codes lie between")],
)
def test_an_unknown_code_names_close_ones(given, said, rankwise):
    done = rankwise("explain", given)
    assert done.code == 2
    assert done.stderr.startswith("error RW123: ")
    assert said in done.stderr


def test_a_wheel_carries_the_page(tmp_path, monkeypatch):
    """Who installs from a wheel has no docs/."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    command = runpy.run_path("setup.py")["commands"]["build_py"](Distribution({"name": "rankwise", "packages": []}))
    (tmp_path / "rankwise").mkdir()
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    command.run()
    assert (tmp_path / "rankwise" / "errors.md").read_bytes() == PAGE.read_bytes()
    assert "docs/errors.md" in command.get_source_files()
