"""Tables of all commands look alike."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rankwise import cli
from rankwise.verbs.output import light_table, titled

MODULES = [path for path in sorted(Path(cli.__file__).parent.glob("*.py")) if path.name != "output.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_command_takes_the_one_table(path: Path):
    """``Table.grid``, which has neither head nor lines, only lays things out."""
    assert " Table(" not in path.read_text(encoding="utf-8")


def test_a_title_longer_than_its_table_stays_a_line_and_nothing_is_drawn():
    table = light_table()
    table.add_column("")
    table.add_column("base")
    table.add_row("loss", "1.2")
    console = Console(file=io.StringIO(), width=100)
    console.print(titled("perplexity: 12 rows, standard errors clustered by 3 sources [a]", table))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines == [
        "perplexity: 12 rows, standard errors clustered by 3 sources [a]",
        "      base",
        "loss  1.2",
    ]
