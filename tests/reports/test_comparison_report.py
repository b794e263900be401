"""The report of a comparison: what it says, and that foreign text stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparison_folders import HOSTILE, METHODS, write_comparison

from rankwise.reports.comparison import Comparison
from rankwise.reports.numbers import visible
from rankwise.reports.page import page
from rankwise.reports.words import headline, method_name

SECTIONS = (
    "methods",
    "differences",
    "tradeoffs",
    "curves",
    "answers",
    "warnings",
    "reproduce",
)


class Page(HTMLParser):
    """What a browser would make of the page: elements, their attributes, and the text outside script and style."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report_of(folder: Path, **given: object) -> tuple[Page, dict]:
    document = write_comparison(folder, **given)
    return Page(page(Comparison(document, folder))), document


def test_every_section_is_there(tmp_path):
    found, _ = report_of(tmp_path)
    assert [item["id"] for item in found.named("section")] == list(SECTIONS)
    for words in ("could detect a difference of", "3 seeds", "paired by seed", "x86_64", "nats per token"):
        assert words in found.text


def test_the_verdicts_correction_is_explained_where_the_bars_are(tmp_path):
    found, document = report_of(tmp_path)
    # QDoRA is not tuned.
    assert {item["comparisons"] for item in document["differences"]} == {2}
    assert "p-values corrected for 2 comparisons with the best method" in found.text


def test_the_page_has_the_verdicts_and_the_means_of_the_fields(tmp_path):
    document = write_comparison(tmp_path)
    html = page(Comparison(document, tmp_path))
    assert headline(document) in Page(html).text
    rows = [Page(row).text for row in re.findall(r'<tr role="row".*?</tr>', html, re.DOTALL)]
    for name in METHODS:
        said = document["methods"][name]["verdict"]["verdict"].replace("best", "–")
        assert any(row.strip().startswith(method_name(name)) and said in row for row in rows)
    assert any("the base model" in row and "2.596" in row for row in rows)


def test_the_page_asks_no_network_for_anything_and_runs_no_script(tmp_path):
    document = write_comparison(tmp_path)
    html = page(Comparison(document, tmp_path))
    found = Page(html)
    assert not re.search(r'(?<!xmlns=")(?<!xmlns:xlink=")https?:|url\((?!#)|@import|@font-face', html)
    assert [item["href"] for item in found.named("link")] == ["data:,"]
    outside = [(tag, name) for tag, given in found.elements for name in given if name in ("src", "srcset", "action")]
    assert outside == []
    policy = next(item["content"] for item in found.named("meta") if item.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "script" not in policy


def assert_only_text(found: Page) -> None:
    assert not {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in found.elements}
    assert not [name for _, given in found.elements for name in given if name.startswith("on")]
    assert not re.search("[\u202e\x00]", found.text)


def test_foreign_text_stays_text(tmp_path):
    found, _ = report_of(tmp_path, hostile=True)
    assert_only_text(found)
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[2]):
        assert visible(text) in found.text


@pytest.mark.parametrize("name", HOSTILE[:2])
def test_a_foreign_name_of_a_method_stays_text(tmp_path, name):
    (tmp_path / "c").mkdir()
    document = json.loads(json.dumps(write_comparison(tmp_path / "c")).replace('"qdora"', json.dumps(name)))
    found = Page(page(Comparison(document, tmp_path / "c")))
    assert_only_text(found)
    assert visible(name) in found.text


def test_one_seed_says_that_no_interval_can_be_given(tmp_path):
    found, _ = report_of(tmp_path, seeds=(0,))
    assert "is too small to detect any difference" in found.text
    assert "±\u202f" not in found.text


def test_what_failed_and_what_was_skipped_is_said_with_the_reason(tmp_path):
    found, _ = report_of(tmp_path)
    assert "the memory of the device is full" in found.text
    assert "it needs the package peft." in found.text
    assert "3 of 256 evaluation rows are in train." in found.text
