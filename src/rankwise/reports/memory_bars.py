"""Stacked bars of memory against a card's line, as one self-contained SVG that follows light and dark mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from rankwise.reports.loss_plot import COLOURS, FONT
from rankwise.reports.numbers import byte_size
from rankwise.reports.scale import Scale, nice_ticks, tick_label

WIDTH = 800
LEFT, RIGHT, TOP, BOTTOM = 84, 132, 112, 52
ROW, THICK = 46, 26
MOST_OF_LIMIT = 2.5
# Bars are cut at this multiple of the limit, so that one giant does not flatten the rest.
NARROWEST = 0.6
# Pixels below which a part is not drawn.
LEGEND_LETTER = 6.7


@dataclasses.dataclass(frozen=True)
class MemoryBar:
    """One row: parts in drawing order, in bytes."""

    name: str
    parts: Mapping[str, int]
    error: float = 0.0
    # Relative; drawn as a whisker at the end.

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


def memory_svg(bars: Sequence[MemoryBar], title: str, caption: str, limit_bytes: int, limit_name: str) -> str:
    """``bars`` from top to bottom, a part a colour, a vertical line at ``limit_bytes``; the peak stands at each end."""
    frame = _Frame.around(bars, limit_bytes)
    labels = list(dict.fromkeys(label for bar in bars for label in bar.parts))
    colour = {label: index for index, label in enumerate(labels)}
    body = [
        f'<text class="title" x="{LEFT}" y="30">{escape(title)}</text>',
        f'<text class="small" x="{LEFT}" y="52">{escape(caption)}</text>',
        *_legend(colour),
        *frame.axes(),
        *(line for index, bar in enumerate(bars) for line in _bar(bar, index, frame, colour)),
        *_limit(frame, limit_bytes, limit_name),
        # Over the line, so that it does not cross the figures.
        *(line for index, bar in enumerate(bars) for line in _end(bar, index, frame, limit_bytes)),
    ]
    return _document(title, _description(bars, limit_bytes), "\n".join(body), frame.height, len(labels))


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Bytes to pixels, and the height that the rows need."""

    x: Scale
    rows: int

    @classmethod
    def around(cls, bars: Sequence[MemoryBar], limit_bytes: int) -> _Frame:
        largest = max((bar.peak_bytes * (1 + bar.error) for bar in bars), default=1)
        high = max(min(largest, MOST_OF_LIMIT * limit_bytes), 1.08 * limit_bytes)
        return cls(Scale(0, high, LEFT, WIDTH - RIGHT), len(bars))

    @property
    def height(self) -> int:
        return TOP + self.rows * ROW + BOTTOM

    @property
    def base(self) -> int:
        return TOP + self.rows * ROW

    def axes(self) -> Iterator[str]:
        unit, name = unit_of(self.x.high)
        ticks = nice_ticks(0, self.x.high / unit, 7)
        for tick in ticks:
            x = self.x(tick * unit)
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{self.base}"/>'
            label = tick_label(tick, ticks)
            yield f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{self.base + 20}">{label}</text>'
        middle = (LEFT + WIDTH - RIGHT) / 2
        where = f'x="{middle:.0f}" y="{self.base + 42}"'
        yield f'<text class="small" text-anchor="middle" {where}>peak memory, {name}</text>'


def _bar(bar: MemoryBar, index: int, frame: _Frame, colour: Mapping[str, int]) -> Iterator[str]:
    top, middle = TOP + index * ROW + (ROW - THICK) / 2, TOP + index * ROW + ROW / 2
    yield f'<text class="name" text-anchor="end" x="{LEFT - 10}" y="{middle + 5:.1f}">{escape(bar.name)}</text>'
    start = 0
    for label, size in bar.parts.items():
        left, right = (frame.x(min(edge, frame.x.high)) for edge in (start, start + size))
        start += size
        if right - left >= NARROWEST:
            tip = f"<title>{escape(bar.name)}, {escape(label)}: {byte_size(size)}</title>"
            where = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{THICK}"'
            yield f'<rect class="part f{colour[label]}" {where}>{tip}</rect>'


def _end(bar: MemoryBar, index: int, frame: _Frame, limit_bytes: int) -> Iterator[str]:
    """The peak in figures, with the whisker of its error or the arrow of a bar that goes on."""
    end, middle = frame.x(min(bar.peak_bytes, frame.x.high)), TOP + index * ROW + ROW / 2
    if bar.peak_bytes > frame.x.high:
        points = f"{end:.1f},{middle - 13} {end + 11:.1f},{middle} {end:.1f},{middle + 13}"
        yield f'<polygon class="arrow" points="{points}"/>'
        reach = end + 11
    else:
        low, high = (frame.x(min(bar.peak_bytes * (1 + sign * bar.error), frame.x.high)) for sign in (-1, 1))
        yield f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}M{high:.1f} {middle - 5:.1f}v10"/>'
        reach = high
    style = "over" if bar.peak_bytes > limit_bytes else "value"
    text = f"{byte_size(bar.peak_bytes)}{' ±' + format(bar.error, '.0%') if bar.error else ''}".replace("%", " %")
    yield f'<text class="{style} halo" x="{reach + 8:.1f}" y="{middle + 5:.1f}">{text}</text>'


def _limit(frame: _Frame, limit_bytes: int, name: str) -> Iterator[str]:
    x = frame.x(limit_bytes)
    yield f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{frame.base}"/>'
    text = f"{escape(name)}: {byte_size(limit_bytes)}"
    anchor = "end" if x > (LEFT + WIDTH - RIGHT) / 2 else "start"
    yield f'<text class="note" text-anchor="{anchor}" x="{x:.1f}" y="{TOP - 14}">{text}</text>'


def _legend(colour: Mapping[str, int]) -> Iterator[str]:
    x = float(LEFT)
    for label, index in colour.items():
        yield f'<rect class="part f{index}" x="{x:.1f}" y="66" width="11" height="11"/>'
        yield f'<text class="small" x="{x + 16:.1f}" y="76">{escape(label)}</text>'
        x += 34 + LEGEND_LETTER * len(label)


def unit_of(size_bytes: float) -> tuple[float, str]:
    """The decimal unit in which a size reads best."""
    return (1e9, "GB") if size_bytes >= 0.9995e9 else (1e6, "MB")


def _description(bars: Sequence[MemoryBar], limit_bytes: int) -> str:
    rows = ", ".join(f"{bar.name} {byte_size(bar.peak_bytes)}" for bar in bars)
    return f"peak memory: {rows}; the line stands at {byte_size(limit_bytes)}"


def _document(title: str, description: str, body: str, height: int, parts: int) -> str:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t d">
<title id="t">{escape(title)}</title>
<desc id="d">{escape(description)}</desc>
<style>
{_style(parts)}
</style>
<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>
{body}
</svg>
"""


def _style(parts: int) -> str:
    return f"""text {{ font-family: {FONT}; font-size: 13px; fill: #1c2733; }}
.page {{ fill: #ffffff; }}
.title {{ font-size: 17px; font-weight: 600; }}
.small, .tick {{ font-size: 12px; fill: #55616e; }}
.tick {{ font-variant-numeric: tabular-nums; }}
.name, .value, .over, .note {{ font-weight: 600; }}
.over, .note {{ fill: #a3262e; }}
.halo {{ paint-order: stroke; stroke: #ffffff; stroke-width: 4px; stroke-linejoin: round; }}
.grid {{ stroke: #e4e8ec; stroke-width: 1; }}
.part {{ stroke: #ffffff; stroke-width: 1; }}
.whisker {{ fill: none; stroke: #1c2733; stroke-width: 1.4; }}
.arrow {{ fill: #8a96a3; }}
.limit {{ stroke: #a3262e; stroke-width: 1.6; stroke-dasharray: 5 3; }}
{_palette(0, parts)}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6ebf0; }}
.page {{ fill: #12161b; }}
.small, .tick {{ fill: #a3afbb; }}
.over, .note {{ fill: #ff8f8f; }}
.halo {{ stroke: #12161b; }}
.grid {{ stroke: #29313a; }}
.part {{ stroke: #12161b; }}
.whisker {{ stroke: #e6ebf0; }}
.limit {{ stroke: #ff8f8f; }}
{_palette(1, parts)}
}}"""


def _palette(mode: int, count: int) -> str:
    chosen = [COLOURS[index % len(COLOURS)][mode] for index in range(count)]
    return "\n".join(f".f{index} {{ fill: {colour}; }}" for index, colour in enumerate(chosen))
