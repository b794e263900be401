"""Loss curves as one self-contained SVG: text is text, and it follows the reader's light or dark mode."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rankwise.reports.scale import Scale, nice_ticks, robust_range, smoothed, spread, tick_label, whole_ticks

WIDTH, HEIGHT = 800, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 132, 78, 52
# LEFT holds the turned name of the axis beside figures of six signs.
LABEL_GAP = 17
NOTE_BELOW = 26
NOTE_PLACES = (NOTE_BELOW, -16, -32, 42, -48)
# From the ring's centre to the baseline of its note, the better place first.
NOTE_HEIGHT, NOTE_LETTER, NOTE_GAP = 10, 7.0, 8.0
# Pixels: of capitals, of a letter on average, and the free space that is enough.
COLOURS = (
    ("#1f6fb4", "#74b3ee"),
    ("#c4560f", "#f5a15d"),
    ("#2c7f4a", "#6fce93"),
    ("#8146a8", "#c9a0ea"),
    ("#9a7400", "#e3c04f"),
    ("#b02a55", "#f08bab"),
)
# Light mode, dark mode; each at least 4.5 : 1 against its background.
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run: (step, loss) of the training log and of the evaluations."""

    name: str
    training: list[Point]
    evaluation: list[Point]
    kept_step: int | None

    @property
    def smooth(self) -> list[Point]:
        values = smoothed([loss for _, loss in self.training], len(self.training) / 12)
        return [(step, value) for (step, _), value in zip(self.training, values)]

    @property
    def best(self) -> Point | None:
        """The evaluation of the kept step, else the lowest after the start."""
        trained = [point for point in self.evaluation if point[0] > 0]
        chosen = [point for point in trained if point[0] == self.kept_step]
        return next(iter(chosen), min(trained, key=lambda point: point[1], default=None))


def loss_svg(
    metrics: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    title: str,
    *,
    kept_step: int | None = None,
) -> str:
    """The lines of one ``metrics.jsonl``, or ``{name: lines}`` of several runs to compare, as an SVG document.

    The logged training loss is drawn lightly under its moving average, evaluations as points, the kept checkpoint
    (``kept_step``, by default the lowest evaluation) with a ring. Lines without a loss are passed over.
    """
    if isinstance(metrics, Mapping):
        curves = [_curve(name, lines, None) for name, lines in metrics.items()]
    else:
        curves = [_curve("", metrics, kept_step)]
    frame = _Frame.around(curves)
    body = [frame.axes(), *(_draw(curve, frame, index, len(curves) > 1) for index, curve in enumerate(curves))]
    labels = _end_labels(curves, frame)
    heading = f'<text class="title" x="{LEFT}" y="30">{escape(title)}</text>'
    caption = f'<text class="small" x="{LEFT}" y="52">{escape(_caption(curves))}</text>'
    return _document(title, _caption(curves), "\n".join([heading, caption, *body, labels]), len(curves))


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where the data lies on the page."""

    x: Scale
    y: Scale

    @classmethod
    def around(cls, curves: Sequence[Curve]) -> _Frame:
        shown = [loss for curve in curves for _, loss in [*curve.smooth, *curve.evaluation]]
        noisy = [loss for curve in curves for _, loss in curve.training]
        last = max((step for curve in curves for step, _ in [*curve.training, *curve.evaluation]), default=1)
        low, high = robust_range(shown, noisy)
        if len(curves) == 1 and curves[0].best is not None:
            share = (NOTE_BELOW + NOTE_GAP) / (HEIGHT - BOTTOM - TOP)
            low = min(low, (curves[0].best[1] - share * high) / (1 - share))
        return cls(Scale(0, max(last, 1), LEFT, WIDTH - RIGHT), Scale(low, high, HEIGHT - BOTTOM, TOP))

    def axes(self) -> str:
        ticks = nice_ticks(self.y.low, self.y.high, 5)
        parts = []
        for tick in ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            label = tick_label(tick, ticks)
            parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 10}" y="{y + 4:.1f}">{label}</text>')
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        for step in whole_ticks(int(self.x.high), 6):
            x = self.x(step)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>')
            parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{base + 20}">{step:,}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        where = f'x="{middle:.0f}" y="{HEIGHT - 10}"'
        parts.append(f'<text class="small" text-anchor="middle" {where}>optimizer step</text>')
        turned = (TOP + base) / 2
        parts.append(
            f'<text class="small" text-anchor="middle" transform="translate(16 {turned:.0f}) rotate(-90)">'
            "loss per token</text>"
        )
        return "\n".join(parts)

    def heights(self, points: Sequence[Point], left: float, right: float) -> Iterator[float]:
        """Where the line through ``points`` runs between two x, in pixels, every few pixels."""
        for (step, loss), (next_step, next_loss) in itertools.pairwise(points):
            start, end = self.x(step), self.x(next_step)
            count = max(1, round((end - start) / 4)) if end >= left and start <= right else 0
            for index in range(count + 1 if count else 0):
                share = index / count
                if left <= start + share * (end - start) <= right:
                    yield self.y(loss + share * (next_loss - loss))

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(step):.1f} {self.y(loss):.1f}" for step, loss in points)


def _curve(name: str, lines: Iterable[Mapping[str, Any]], kept_step: int | None) -> Curve:
    rows = list(lines)
    return Curve(name, _points(rows, "loss"), _points(rows, "eval_loss"), kept_step)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float) and "step" in row]
    return [(float(step), float(loss)) for step, loss in found if math.isfinite(loss)]


def _draw(curve: Curve, frame: _Frame, index: int, several: bool) -> str:
    train, evaluation = (index, index) if several else (0, 1)
    parts = []
    if curve.training:
        if not several:
            parts.append(f'<path class="raw c{train}" clip-path="url(#plot)" d="{frame.path(curve.training)}"/>')
        parts.append(f'<path class="line c{train}" clip-path="url(#plot)" d="{frame.path(curve.smooth)}"/>')
    if len(curve.evaluation) > 1:
        parts.append(f'<path class="thread c{evaluation}" d="{frame.path(curve.evaluation)}"/>')
    for step, loss in curve.evaluation:
        tip = f"<title>{escape(curve.name)} step {step:,.0f}: evaluation loss {loss:.4f}</title>"
        parts.append(f'<circle class="dot f{evaluation}" {_at(frame, step, loss)} r="3.6">{tip}</circle>')
    if curve.best is not None:
        parts.append(f'<circle class="ring c{evaluation}" {_at(frame, *curve.best)} r="7.5"/>')
        if not several:
            parts.append(_best_label(curve, curve.best, frame))
    return "\n".join(parts)


def _best_label(curve: Curve, best: Point, frame: _Frame) -> str:
    """The note beside the ring, where the curves leave it the most room: rather inward, rather below."""
    x, y = frame.x(best[0]), frame.y(best[1])
    text = f"kept: step {best[0]:,.0f}, {best[1]:.3f}"
    width = NOTE_LETTER * len(text)
    lines = (curve.smooth, curve.training, curve.evaluation)
    sides = [("end", x + 6, x + 6 - width), ("start", x - 6, x - 6)]
    if x < (LEFT + WIDTH - RIGHT) / 2:
        sides.reverse()
    places = []
    for anchor, where, left in sides:
        heights = [height for line in lines for height in frame.heights(line, left, left + width)]
        is_inside = left >= LEFT - 6 and left + width <= WIDTH - RIGHT + 6
        for baseline in (y + offset for offset in NOTE_PLACES):
            places.append((_room(baseline, heights) if is_inside else -1.0, anchor, where, baseline))
    _, anchor, x, y = max(places, key=lambda place: place[0])
    return f'<text class="note halo" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _room(baseline: float, heights: Sequence[float]) -> float:
    """Pixels between a note and the nearest of ``heights``; more than enough counts no more, the axis as none."""
    if not TOP < baseline < HEIGHT - BOTTOM - NOTE_GAP / 2:
        return -1.0
    top, bottom = baseline - NOTE_HEIGHT, baseline + 3
    return min([NOTE_GAP, *(max(top - height, height - bottom, 0.0) for height in heights)])


def _end_labels(curves: Sequence[Curve], frame: _Frame) -> str:
    """Names at the right ends of the lines, in their colours: no legend to look up."""
    ends: list[tuple[float, str, int]] = []
    for index, curve in enumerate(curves):
        if len(curves) > 1:
            points = curve.smooth or curve.evaluation
            ends += [(frame.y(points[-1][1]), curve.name, index)] if points else []
            continue
        ends += [(frame.y(curve.smooth[-1][1]), "training", 0)] if curve.training else []
        ends += [(frame.y(curve.evaluation[-1][1]), "evaluation", 1)] if curve.evaluation else []
    heights = spread([y for y, _, _ in ends], LABEL_GAP, TOP, HEIGHT - BOTTOM)
    x = WIDTH - RIGHT + 12
    return "\n".join(
        f'<text class="label f{colour}" x="{x}" y="{y + 4:.1f}">{escape(_short(name))}</text>'
        for y, (_, name, colour) in zip(heights, ends)
    )


def _caption(curves: Sequence[Curve]) -> str:
    if len(curves) > 1:
        return "lines: training loss, smoothed; points: evaluation; ring: lowest evaluation"
    curve = curves[0]
    parts = []
    if curve.training:
        parts.append(f"training {curve.smooth[0][1]:.3f} → {curve.smooth[-1][1]:.3f} (line: smoothed)")
    if curve.evaluation:
        first, best = curve.evaluation[0], curve.best or curve.evaluation[-1]
        parts.append(f"evaluation {first[1]:.3f} → {best[1]:.3f} (points)")
    return "; ".join(parts) or "nothing was logged"


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _at(frame: _Frame, step: float, loss: float) -> str:
    return f'cx="{frame.x(step):.1f}" cy="{frame.y(loss):.1f}"'


def _document(title: str, description: str, body: str, curves: int) -> str:
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d">
<title id="t">{escape(title)}</title>
<desc id="d">{escape(description)}</desc>
<style>
{_style(max(curves, 2))}
</style>
<defs><clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/></clipPath></defs>
<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>
{body}
</svg>
"""


def _style(colours: int) -> str:
    return f"""text {{ font-family: {FONT}; font-size: 13px; fill: #1c2733; }}
.page {{ fill: #ffffff; }}
.title {{ font-size: 17px; font-weight: 600; }}
.small, .tick {{ font-size: 12px; fill: #55616e; }}
.tick {{ font-variant-numeric: tabular-nums; }}
.label, .note {{ font-weight: 600; }}
.note {{ font-size: 12px; }}
.halo {{ paint-order: stroke; stroke: #ffffff; stroke-width: 4px; stroke-linejoin: round; }}
.grid {{ stroke: #e4e8ec; stroke-width: 1; }}
.axis {{ stroke: #8a96a3; stroke-width: 1; }}
.raw, .line, .thread, .ring {{ fill: none; stroke-linejoin: round; stroke-linecap: round; }}
.raw {{ stroke-width: 1; opacity: 0.35; }}
.line {{ stroke-width: 2.2; }}
.thread {{ stroke-width: 1.4; stroke-dasharray: 1 4; }}
.dot {{ stroke: #ffffff; stroke-width: 1.2; }}
.ring {{ stroke-width: 2; }}
{_palette(0, colours)}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6ebf0; }}
.page {{ fill: #12161b; }}
.small, .tick {{ fill: #a3afbb; }}
.halo {{ stroke: #12161b; }}
.grid {{ stroke: #29313a; }}
.axis {{ stroke: #73808d; }}
.dot {{ stroke: #12161b; }}
{_palette(1, colours)}
}}"""


def _palette(mode: int, count: int) -> str:
    chosen = [COLOURS[index % len(COLOURS)][mode] for index in range(count)]
    # `text.f0` outranks the plain `text` rule.
    return "\n".join(
        f".c{index} {{ stroke: {colour}; }} .f{index}, text.f{index} {{ fill: {colour}; }}"
        for index, colour in enumerate(chosen)
    )
