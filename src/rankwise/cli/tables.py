"""The style of every table on the console: no lines, a dim head, the title above."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text


def light_table(*, gap: int = 2, expand: bool = False) -> Table:
    """An empty table with ``gap`` blanks between its columns, as wide as its content unless ``expand``."""
    return Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim", expand=expand)


def titled(title: str, table: Table) -> Group:
    """A table with its title above: rich would wrap a title at the width of the table."""
    return Group(Text(title, style="bold"), table)
