"""From data to pixels: ranges, round ticks, smoothing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

Point = tuple[float, float]
# Points of a long curve that are drawn.
LONGEST_LINE = 400


@dataclasses.dataclass(frozen=True)
class Scale:
    """The line that takes ``low`` to ``start`` and ``high`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def whole_ticks(high: int, count: int) -> list[int]:
    """About ``count`` whole round numbers within [0, high]."""
    return sorted({round(tick) for tick in nice_ticks(0, high, count) if abs(tick - round(tick)) < 1e-9})


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """``value`` with as many decimals as the distance of the ticks needs."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**decimals, 6) % 1:
        decimals += 1
    return f"{value:.{decimals}f}"


def value_range(values: Iterable[float], *, air: float = 0.08) -> tuple[float, float]:
    """The range of ``values`` with a margin on both sides; never empty."""
    found = list(values)
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    room = air * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def robust_range(shown: Sequence[float], noisy: Sequence[float]) -> tuple[float, float]:
    """A range that holds all of ``shown``, the middle 98 % of ``noisy``, and a margin."""
    ordered = sorted(noisy)
    edge = len(ordered) // 100
    return value_range([*shown, *ordered[edge : len(ordered) - edge]], air=0.06)


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """An exponential moving average over about ``span`` values, corrected for its start."""
    keep = 1 - 2 / (max(span, 1.0) + 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def thinned(points: Sequence[Point], most: int = LONGEST_LINE) -> Sequence[Point]:
    """About ``most`` of the points of a curve and its last one; the eye sees no difference."""
    every = math.ceil(len(points) / most) or 1
    return [*points[::every], points[-1]] if every > 1 else points


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """``positions`` moved apart so that labels do not overlap, by as little as a pass from top to bottom allows."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = list(positions)
    floor = low
    for index in order:
        placed[index] = max(placed[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed
