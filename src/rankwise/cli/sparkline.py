"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` bars; several values that share a bar are averaged, NaN is a gap."""
    bins = [sum(chunk) / len(chunk) for chunk in _chunks(values, width)]
    finite = [value for value in bins if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    last = len(BARS) - 1
    return "".join(BARS[round((value - low) / span * last)] if math.isfinite(value) else " " for value in bins)


def position(index: int, count: int, width: int) -> int:
    """The column of the sparkline in which value ``index`` of ``count`` stands."""
    return index if count <= width else min(width - 1, index * width // count)


def _chunks(values: Sequence[float], width: int) -> list[Sequence[float]]:
    if len(values) <= width:
        return [[value] for value in values]
    groups: list[list[float]] = [[] for _ in range(width)]
    for index, value in enumerate(values):
        groups[position(index, len(values), width)].append(value)
    return list(groups)
