"""The picture of a plan: bars in proportion, the card's line, nothing that runs."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from rankwise.reports.memory_bars import MemoryBar, memory_svg

SVG = "{http://www.w3.org/2000/svg}"
GB = 10**9
BARS = [
    MemoryBar("lora", {"weights": 10 * GB, "activations": 6 * GB}, 0.08),
    MemoryBar("qlora", {"weights": 3 * GB, "activations": 6 * GB}, 0.08),
]


def drawn(bars=BARS, limit=12 * GB, title="a model", name="a card"):
    return ElementTree.fromstring(memory_svg(bars, title, "a caption", limit, name))


def share(item, name):
    return float(item.get(name).rstrip("%"))


def parts(root):
    found = [
        item
        for item in root.iter(f"{SVG}rect")
        if "part" in item.get("class", "") and item.find(f"{SVG}title") is not None
    ]
    return [(item.get("class"), share(item, "x"), share(item, "width")) for item in found]


def test_widths_are_in_proportion_and_parts_touch():
    (_, x0, weights), (_, x1, activations), (_, _, small), _ = parts(drawn())
    assert weights / activations == pytest.approx(10 / 6, rel=0.01)
    assert weights / small == pytest.approx(10 / 3, rel=0.01)
    assert x0 + weights == pytest.approx(x1, abs=0.02)


def test_a_part_keeps_its_colour_in_every_bar():
    classes = [name for name, _, _ in parts(drawn())]
    assert classes[0] == classes[2] != classes[1] == classes[3]


def test_the_line_stands_at_the_memory():
    root = drawn()
    limit = next(item for item in root.iter(f"{SVG}line") if item.get("class") == "limit")
    (_, x0, weights), *_ = parts(root)
    assert share(limit, "x1") == pytest.approx(x0 + weights * 12 / 10, abs=0.03)


def test_figures_stand_over_the_line():
    classes = [item.get("class", "") for item in drawn().iter()]
    assert classes.index("limit") < min(index for index, name in enumerate(classes) if "halo" in name)


def test_a_bar_beyond_every_card_is_cut_and_says_its_size():
    giant = MemoryBar("full", {"weights": 900 * GB})
    root = drawn([*BARS, giant])
    assert max(x + width for _, x, width in parts(root)) <= 100.1
    assert any("900 GB" in (item.text or "") for item in root.iter(f"{SVG}text"))
    assert any(item.get("class") == "arrow" for item in root.iter(f"{SVG}path"))


def test_foreign_names_stay_text():
    root = drawn([MemoryBar("<script>", {"a&b": GB})], title="x</svg><script>alert(1)</script>", name='"<b>')
    assert not list(root.iter(f"{SVG}script"))


def test_it_is_described_for_who_cannot_see_it():
    root = drawn()
    assert root.get("role") == "img"
    assert "16.0 GB" in root.find(f"{SVG}desc").text


def test_an_empty_part_is_left_out():
    assert len(parts(drawn([MemoryBar("lora", {"weights": GB, "logits": 0})]))) == 1
