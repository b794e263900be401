"""The report of a comparison: what is in its three files, that foreign text stays text, and that no torch is needed."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparison_folders import HOSTILE, METHODS, write_comparison

from rankwise.errors import RunError
from rankwise.reports.naming import method_name
from rankwise.reports.numbers import visible
from rankwise.reports.report import write_report
from rankwise.reports.words import headline

SECTIONS = (
    "methods",
    "differences",
    "tradeoffs",
    "memory",
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


def report_of(folder: Path, **given: object) -> tuple[Page, str, dict]:
    folder.mkdir(parents=True)
    write_comparison(folder, **given)
    html, text, document = write_report(folder)
    return Page(html.read_text()), text.read_text(), json.loads(document.read_text())


def test_every_section_is_there(tmp_path):
    page, _, _ = report_of(tmp_path / "c")
    assert [item["id"] for item in page.named("section")] == list(SECTIONS)
    for words in ("could detect a difference of", "3 seeds", "Paired by seed", "x86_64", "nats per token"):
        assert words in page.text


def test_the_verdicts_correction_is_explained_where_the_bars_are(tmp_path):
    page, _, document = report_of(tmp_path / "c")
    # QDoRA is not tuned.
    assert {item["comparisons"] for item in document["differences"]} == {2}
    assert "p-values corrected for 2 comparisons with the best method" in page.text


def changed_report(folder: Path, change: Callable[[dict], None]) -> tuple[Page, str]:
    folder.mkdir()
    write_comparison(folder)
    file = folder / "comparison.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    html, text, _ = write_report(folder)
    return Page(html.read_text()), text.read_text()


def test_every_file_has_the_verdicts_of_the_fields(tmp_path):
    page, text, document = report_of(tmp_path / "c")
    assert headline(document) in page.text
    assert headline(document) in text.replace("\\", "")
    for name in METHODS:
        said = document["methods"][name]["verdict"]["verdict"].replace("best", "–")
        row = next(line for line in text.splitlines() if re.match(rf"\| {method_name(name)}\b", line))
        assert f"| {said} |" in row
    assert "reason" not in document["recommendation"]


def test_the_json_has_a_flat_record_a_run_and_the_figures(tmp_path):
    _, _, document = report_of(tmp_path / "c")
    finals = [run for run in document["runs"] if run["phase"] == "final" and run["status"] == "finished"]
    assert len(finals) == len(METHODS) * 3
    for run in finals:
        assert {"method", "seed", "eval_loss", "peak_memory_bytes", "settings"} <= run.keys()
    for name in METHODS:
        losses = [run["eval_loss"] for run in finals if run["method"] == name]
        assert document["methods"][name]["mean"]["eval_loss"] == pytest.approx(statistics.mean(losses))
    assert document["recommendation"]["method"] in METHODS
    assert document["recommendation"]["config"] == "recommended.yaml"
    assert {"full", "prefix"} <= {run["method"] for run in document["runs"]}


def test_the_page_asks_no_network_for_anything(tmp_path):
    folder = tmp_path / "c"
    page, _, _ = report_of(folder)
    html = (folder / "report.html").read_text()
    assert not re.search(r'(?<!xmlns=")(?<!xmlns:xlink=")https?:|url\((?!#)|@import|@font-face', html)
    assert [item["href"] for item in page.named("link")] == ["data:,"]
    outside = [(tag, name) for tag, given in page.elements for name in given if name in ("src", "srcset", "action")]
    assert outside == []


def test_foreign_text_stays_text(tmp_path):
    folder = tmp_path / "c"
    page, markdown, _ = report_of(folder, hostile=True)
    assert len(page.named("script")) == 1
    assert not {"img", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[2]):
        assert visible(text) in page.text
    assert "\u202e" not in page.text
    assert "\x00" not in (folder / "report.html").read_text()
    assert "<script" not in markdown.replace("\\<", "")


@pytest.mark.parametrize("name", HOSTILE[:2])
def test_a_foreign_name_of_a_method_or_a_metric_stays_text(tmp_path, name):
    write_comparison(tmp_path)
    path = tmp_path / "comparison.json"
    text = path.read_text().replace('"qdora"', json.dumps(name)).replace("e2e.CIDEr", json.dumps(f"e2e.{name}")[1:-1])
    path.write_text(text)
    html, markdown, document = (file.read_text() for file in write_report(tmp_path))
    page = Page(html)
    assert len(page.named("script")) == 1
    assert not {"img", "iframe"} & {tag for tag, _ in page.elements}
    assert not [key for _, given in page.elements for key in given if key.startswith("on")]
    assert visible(name) in page.text
    assert "\x00" not in html + markdown
    assert name in json.loads(document)["methods"]


def test_the_policy_allows_the_page_s_own_script_and_no_other(tmp_path):
    import base64
    import hashlib

    folder = tmp_path / "c"
    page, _, _ = report_of(folder)
    script = re.search(r"<script>(.*)</script>", (folder / "report.html").read_text(), re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(item["content"] for item in page.named("meta") if item.get("http-equiv"))
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_cells_keep_the_shape_of_markdown_tables(tmp_path):
    _, markdown, _ = report_of(tmp_path / "c", hostile=True)
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_one_seed_says_that_no_interval_can_be_given(tmp_path):
    page, markdown, _ = report_of(tmp_path / "c", seeds=(0,))
    assert "is too small to detect any difference" in page.text
    assert "is too small to detect any difference" in markdown
    assert "±\u202f" not in page.text


def test_what_failed_and_what_was_skipped_is_said_with_the_reason(tmp_path):
    page, markdown, _ = report_of(tmp_path / "c")
    for text in (page.text, markdown.replace("\\", "")):
        assert "the memory of the device is full" in text
        assert "it needs the package peft." in text
        assert "3 of 256 evaluation rows are in train." in text


def test_a_comparison_in_which_nothing_finished_still_has_a_report(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    document = write_comparison(folder)
    document["runs"] = [run for run in document["runs"] if run["status"] != "finished"]
    document["methods"] = {name: document["methods"][name] for name in ("full", "prefix")}
    document |= {"differences": [], "recommendation": {"method": None}, "base": {}, "learning_rates": {}}
    (folder / "comparison.json").write_text(json.dumps(document))
    page = Page(write_report(folder)[0].read_text())
    assert "No recommendation" in page.text
    assert "the memory of the device is full" in page.text


def test_the_file_alone_is_enough(tmp_path):
    """Runs that were deleted or left on another machine cost their curves and answers, no more."""
    folder = tmp_path / "c"
    folder.mkdir()
    write_comparison(folder)
    shutil.rmtree(folder / "runs")
    page = Page(write_report(folder)[0].read_text())
    ids = {item["id"] for item in page.named("section")}
    assert {"methods", "differences", "memory"} <= ids
    assert "answers" not in ids


def test_figures_that_are_not_numbers_are_no_figures(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    document = write_comparison(folder)
    document["methods"]["qdora"] |= {
        "mean": {"eval_loss": float("nan")},
        "peak_memory_bytes": None,
        "wall_seconds": None,
    }
    (folder / "comparison.json").write_text(json.dumps(document))
    html = write_report(folder)[0].read_text()
    assert "nan" not in re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL).lower().replace("guanaco", "")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"schema": 99}',
        '{"schema": 2, "methods": {"lora": 3}}',
        '{"schema": 2, "runs": [{"id": "a", "method": "lora", "folder": "../../etc"}]}',
        '{"schema": 2, "methods": {"lora": {"mean": {"eval_loss": 1}, "serving": [], "interval": {}}},'
        ' "differences": [{"metric": "eval_loss", "per_seed": {}, "a": {}, "b": []}]}',
    ],
)
def test_a_file_that_is_no_comparison_is_refused(tmp_path, content):
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(RunError, match="RW593"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


WITHOUT_TORCH = textwrap.dedent("""
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "transformers", "trl", "accelerate"):
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Absent())
    from rankwise.cli.main import main
    sys.exit(main(sys.argv[1:]))
""")


def test_the_command_needs_no_torch(tmp_path):
    (tmp_path / "a").mkdir()
    write_comparison(tmp_path / "a")
    command = [sys.executable, "-c", WITHOUT_TORCH, "report", "a", "--output", "in one", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["files"] == ["in one/report.html", "in one/report.md", "in one/report.json"]
    assert all((tmp_path / file).is_file() for file in said["files"])


def test_one_folder_keeps_its_own_figures(tmp_path, capsys):
    from rankwise.cli.main import main

    folder = tmp_path / "c"
    folder.mkdir()
    document = write_comparison(folder)
    assert main(["report", str(folder), "--output", str(tmp_path / "elsewhere")]) == 0
    assert headline(document)[:40] in capsys.readouterr().out
    written = json.loads((tmp_path / "elsewhere" / "report.json").read_text())
    assert written["differences"] == document["differences"]
    assert not (folder / "report.html").exists()
