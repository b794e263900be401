"""Stacked bars of memory against a card's line, as one self-contained SVG."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from rankwise.reports.figure import MARKERS, across, document, label, line, tag
from rankwise.reports.numbers import byte_size
from rankwise.reports.scale import Scale, nice_ticks, tick_label

TOP, ROW, THICK = 112, 46, 26
# Bars are cut at this multiple of the limit, so that one giant does not flatten the rest.
MOST_OF_LIMIT = 2.5
# A part that takes less than this percentage of the width is not drawn.
NARROWEST = 0.1
LEGEND_LETTER = 6.7
ARROW = "M0-13L11 0L0 13Z"


@dataclasses.dataclass(frozen=True)
class MemoryBar:
    """One row: parts in drawing order, in bytes."""

    name: str
    parts: Mapping[str, int]
    # Relative error, drawn as an error bar at the end.
    error: float = 0.0

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


def memory_svg(bars: Sequence[MemoryBar], title: str, caption: str, limit_bytes: int, limit_name: str) -> str:
    """Bars from top to bottom, with a colour for each part and a vertical line at ``limit_bytes``.

    The peak stands at the end of each bar.
    """
    largest = max((bar.peak_bytes * (1 + bar.error) for bar in bars), default=1)
    scale = Scale(0, max(min(largest, MOST_OF_LIMIT * limit_bytes), 1.08 * limit_bytes), 0, 100)
    height = ROW * len(bars)
    names = dict.fromkeys(name for bar in bars for name in bar.parts)
    colours = {name: f"m{index % len(MARKERS)}" for index, name in enumerate(names)}
    rows = [(bar, (index + 0.5) * ROW) for index, bar in enumerate(bars)]
    parts = [
        *_legend(colours),
        *_axis(scale, height),
        *(part for bar, middle in rows for part in _bar(bar, middle, scale, colours)),
        *_limit(scale, limit_bytes, limit_name, height),
        # Over the line, so that it does not cross the figures.
        *(part for bar, middle in rows for part in _end(bar, middle, scale, limit_bytes)),
    ]
    peaks = ", ".join(f"{bar.name} {byte_size(bar.peak_bytes)}" for bar in bars)
    description = f"peak memory: {peaks}; the line stands at {byte_size(limit_bytes)}"
    return document(TOP, height, title, caption, *parts, description=description)


def _legend(colours: Mapping[str, str]) -> Iterator[Markup]:
    x = 0.0
    for name, colour in colours.items():
        yield tag("rect", class_=f"part {colour}", x=x, y=66 - TOP, width=11, height=11)
        yield tag("text", name, class_="tick", x=x + 16, y=76 - TOP)
        x += 34 + LEGEND_LETTER * len(name)


def _axis(scale: Scale, height: int) -> Iterator[Markup]:
    unit, name = (1e9, "GB") if scale.high >= 0.9995e9 else (1e6, "MB")
    ticks = nice_ticks(0, scale.high / unit, 7)
    for tick in ticks:
        x = scale(tick * unit)
        yield line(x, 0, x, height, "grid")
        yield label(x, height + 20, tick_label(tick, ticks), "tick", anchor="middle")
    yield label(50, height + 42, f"peak memory, {name}", "tick", anchor="middle")


def _bar(bar: MemoryBar, middle: float, scale: Scale, colours: Mapping[str, str]) -> Iterator[Markup]:
    yield label(0, middle + 5, bar.name, "value", dx=-10, anchor="end")
    start = 0
    for name, size in bar.parts.items():
        left, right = (scale(min(edge, scale.high)) for edge in (start, start + size))
        start += size
        if right - left >= NARROWEST:
            tip = tag("title", f"{bar.name}, {name}: {byte_size(size)}")
            place = {"x": across(left), "width": across(right - left)}
            yield tag("rect", tip, **place, y=middle - THICK / 2, height=THICK, class_=f"part {colours[name]}")


def _end(bar: MemoryBar, middle: float, scale: Scale, limit_bytes: int) -> Iterator[Markup]:
    """The peak in figures, with the error bar of the prediction, or an arrow where the bar is cut off."""
    end, dx = 100.0, 19
    if bar.peak_bytes > scale.high:
        arrow = tag("path", d=ARROW, class_="arrow")
        yield tag("svg", arrow, x=across(end), y=middle, overflow="visible", width=1, height=1)
    else:
        low, end = (scale(min(bar.peak_bytes * (1 + sign * bar.error), scale.high)) for sign in (-1, 1))
        dx = 8
        yield line(low, middle, end, middle, "whisker") + line(end, middle - 5, end, middle + 5, "whisker")
    text = f"{byte_size(bar.peak_bytes)}{' ±' + format(bar.error, '.0%') if bar.error else ''}".replace("%", " %")
    yield label(end, middle + 5, text, f"{'over' if bar.peak_bytes > limit_bytes else 'value'} halo", dx=dx)


def _limit(scale: Scale, limit_bytes: int, name: str, height: int) -> Iterator[Markup]:
    x = scale(limit_bytes)
    yield line(x, -8, x, height, "limit")
    yield label(x, -14, f"{name}: {byte_size(limit_bytes)}", "over", anchor="end" if x > 50 else "start")
