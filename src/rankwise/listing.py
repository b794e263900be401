"""Long lists in one sentence of a message. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable


def some_of(items: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """The first ``limit`` of ``items``, and the number of the others."""
    listed = list(items)
    shown = separator.join(listed[:limit])
    if len(listed) <= limit:
        return shown
    joint = " and " if separator == ", " else f"{separator}and "
    return f"{shown}{joint}{len(listed) - limit:,} more"
