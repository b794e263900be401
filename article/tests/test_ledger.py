"""The ledger has a row for each figure in the article's tables, and a verdict that its values bear out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

LEDGER = Path(__file__).parents[1] / "ledger.toml"
ROWS = tomllib.loads(LEDGER.read_text(encoding="utf-8"))["rows"]
VERDICTS = {"equal", "misquoted", "measured here", "needs a card", "not checked"}


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
