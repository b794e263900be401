"""The ledger has a row for each figure in the article's tables, and a verdict that its values bear out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from rankwise.errors import RunError
from rankwise_article.ledger import ledger, page

LEDGER = Path(__file__).parents[1] / "ledger.toml"
DOCUMENT = tomllib.loads(LEDGER.read_text(encoding="utf-8"))
ROWS = DOCUMENT["rows"]
VERDICTS = {"equal", "misquoted", "measured here", "needs a GPU"}


def test_every_row_is_complete():
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert {"id", "claim", "article", "verdict"} <= set(row)
        assert row["verdict"] in VERDICTS
        if row["verdict"] in ("equal", "misquoted"):
            assert row.get("source") or row.get("ours"), row["id"]
        if row["verdict"] == "measured here":
            assert row.get("command"), row["id"]


def test_every_figure_of_the_tables_has_a_row(shared: Path):
    text = (shared.parent / "article.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    cells = [cell for line in lines for cell in re.findall(r"\|\s*([^|]+?)\s*(?=\|)", line)[1:]]
    figures = {number for cell in cells for number in re.findall(r"\d+(?:\.\d+)?", cell)}
    told = {number for row in ROWS for number in re.findall(r"\d+(?:\.\d+)?", row["article"] + row["claim"])}
    assert figures - told == set()


def test_the_page_is_fresh():
    assert LEDGER.with_name("LEDGER.md").read_text(encoding="utf-8") == page(DOCUMENT), "run make article"


@pytest.mark.parametrize(("ours", "holds"), [("16,777,216", True), ("16.78 million of 16777216", False), ("2", False)])
def test_a_figure_that_its_command_no_longer_gives_is_named(ours, holds, tmp_path):
    (tmp_path / "article").mkdir()
    file = tmp_path / "article" / "ledger.toml"
    row = f"id = 'memory-x', claim = '', article = '', ours = '{ours}', verdict = 'equal'"
    file.write_text(f"rows = [{{ {row}, command = 'echo 16777216' }}, {{ {row}, command = 'false', dear = true }}]")
    if holds:
        assert ledger(file, None, every=False)["checked"] == 1
        return
    with pytest.raises(RunError, match=r"RA261.*memory-x"):
        ledger(file, None, every=False)
