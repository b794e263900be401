"""SVG plots that fit any width. Horizontal positions are in per cent, vertical ones in pixels, so that text keeps its
size.

In a page a plot is ``<div class="plot"><svg width="100%">``. Labels stand outside the box of the SVG, in the padding of
the div. ``document`` makes a plot in a file of its own. ``figure.css`` styles both: the classes ``m0`` to ``m7`` give a
group the colour of a method, and ``currentColor`` in the other rules is that colour.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup, escape

from rankwise.reports.scale import Point, Scale, nice_ticks, tick_label, whole_ticks

# Left, top, right and bottom in pixels.
Box = tuple[float, float, float, float]
# Where a text stands beside a point: dx, dy, anchor.
Place = tuple[float, float, str]
TEMPLATES = Path(__file__).parent / "templates"
STYLE_FILE = TEMPLATES / "figure.css"
# Pixels: a letter's mean width, the height of a line of text.
LETTER, LINE = 7.2, 13.0
# Pixels: the width of a document, and the margins on the left and on the right of its plot.
WIDTH, LEFT, RIGHT = 800, 76, 132
# A shape for each method, so that colour is not needed: disc, square, diamond, triangles, cross, pentagon, bow tie.
MARKERS = (
    "M-4.6 0A4.6 4.6 0 1 1 4.6 0A4.6 4.6 0 1 1-4.6 0Z",
    "M-4.2-4.2H4.2V4.2H-4.2Z",
    "M0-5.8L5.8 0L0 5.8L-5.8 0Z",
    "M0-5.6L5.4 4.2H-5.4Z",
    "M0 5.6L5.4-4.2H-5.4Z",
    "M-1.9-5.2H1.9V-1.9H5.2V1.9H1.9V5.2H-1.9V1.9H-5.2V-1.9H-1.9Z",
    "M0-5.6L5.3-1.7L3.3 4.5H-3.3L-5.3-1.7Z",
    "M-5.4-3.2L0 0L5.4-3.2V3.2L0 0L-5.4 3.2Z",
)


def tag(name: str, *content: str | float, **attributes: str | float | None) -> Markup:
    """An element of SVG or HTML. Content and attributes are escaped unless they are Markup; ``class_`` becomes
    ``class``.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(escape(part) for part in content)
    return Markup("<") + Markup(name + given) + Markup(">") + body + Markup(f"</{name}>")


def _text(value: str | float) -> str | float:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def across(value: float) -> str:
    """A horizontal position in per cent."""
    return f"{value:.3f}".rstrip("0").rstrip(".") + "%"


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=across(x1), x2=across(x2), y1=y1, y2=y2, class_=class_)


def label(x: float, y: float, text: str, class_: str = "", *, dx: float = 0, anchor: str = "start") -> Markup:
    return tag("text", text, x=across(x), y=y, dx=dx or None, text_anchor=anchor, class_=class_ or None)


def marker(kind: int, x: float, y: float, class_: str = "mark", tip: str = "") -> Markup:
    """The shape of method number ``kind``. A path cannot be placed in per cent, so a nested SVG places it."""
    path = tag("path", *([tag("title", tip)] if tip else []), d=MARKERS[kind % len(MARKERS)], class_=class_)
    return tag("svg", path, x=across(x), y=y, overflow="visible", width=1, height=1)


def dot(x: float, y: float, radius: float, class_: str, tip: str = "") -> Markup:
    return tag("circle", *([tag("title", tip)] if tip else []), cx=across(x), cy=y, r=radius, class_=class_)


def group(class_: str, *parts: Markup) -> Markup:
    return tag("g", *parts, class_=class_)


@dataclasses.dataclass(frozen=True)
class Frame:
    """The data area: ``x`` maps to per cent and ``y`` to pixels from the top."""

    x: Scale
    y: Scale
    height: int

    @classmethod
    def of(cls, x: tuple[float, float], y: tuple[float, float], height: int) -> Frame:
        return cls(Scale(*x, 0, 100), Scale(*y, height, 0), height)

    def curve(self, points: Sequence[Point], class_: str, tip: str = "") -> Markup:
        """A line through ``points``, clipped at the edge of the plot. Its stroke does not stretch with the plot."""
        if len(points) < 2:
            return Markup("")
        d = "M" + "L".join(f"{self.x(x):.2f} {self.y(y):.1f}" for x, y in points)
        path = tag(
            "path", *([tag("title", tip)] if tip else []), d=d, class_=class_, vector_effect="non-scaling-stroke"
        )
        box = f"0 0 100 {self.height}"
        return tag("svg", path, width="100%", height=self.height, viewBox=box, preserveAspectRatio="none")

    def dot(self, point: Point, radius: float, class_: str, tip: str = "") -> Markup:
        return dot(self.x(point[0]), round(self.y(point[1]), 1), radius, class_, tip)

    def marker(self, kind: int, point: Point, tip: str) -> Markup:
        return marker(kind, self.x(point[0]), round(self.y(point[1]), 1), tip=tip)

    def grid(self, count: int = 4) -> Markup:
        """Horizontal lines at round values, labelled on the left."""
        ticks = nice_ticks(self.y.low, self.y.high, count)
        parts = []
        for tick in ticks:
            y = round(self.y(tick), 1)
            parts.append(line(0, y, 100, y, "grid"))
            parts.append(label(0, y + 4, _minus(tick_label(tick, ticks)), "tick", dx=-8, anchor="end"))
        return Markup("").join(parts)

    def base(self, ticks: Sequence[float], texts: Sequence[str]) -> Markup:
        """The axis at the bottom with its labels."""
        parts = [line(0, self.height, 100, self.height, "axis")]
        for tick, text in zip(ticks, texts):
            x = self.x(tick)
            anchor = "end" if x > 97 else "start" if x < 2 else "middle"
            parts.append(line(x, self.height, x, self.height + 4, "axis"))
            parts.append(label(x, self.height + 18, text, "tick", anchor=anchor))
        return Markup("").join(parts)

    def steps(self, count: int = 4) -> Markup:
        """The axis of the optimizer's steps."""
        ticks = whole_ticks(int(self.x.high), count)
        return self.base(ticks, [f"{tick:,}" for tick in ticks])

    def svg(
        self, description: str, *parts: Markup, below: int = 24, above: int = 8, left: int = 48, right: int = 12
    ) -> Markup:
        return plot(self.height, description, *parts, below=below, above=above, left=left, right=right)


def plot(
    height: int, description: str, *parts: Markup, below: int = 0, above: int = 0, left: int = 0, right: int = 0
) -> Markup:
    """The SVG with room for labels around it: pixels above, right, below and left."""
    drawing = tag("svg", *parts, width="100%", height=height, role="img", aria_label=description)
    return tag("div", drawing, class_="plot", style=f"padding:{above}px {right}px {below}px {left}px")


def strip_axis(description: str, scale: Scale, ticks: Sequence[float], texts: Sequence[str]) -> Markup:
    """The axis below rows that share ``scale``."""
    parts = [line(0, 0.5, 100, 0.5, "axis")]
    for tick, text in zip(ticks, texts):
        x = scale(tick)
        anchor = "start" if x < 4 else "end" if x > 92 else "middle"
        parts += [line(x, 0, x, 4, "axis"), label(x, 17, text, "tick", anchor=anchor)]
    return plot(20, description, *parts)


def document(top: int, frame_height: int, title: str, caption: str, *parts: Markup, description: str = "") -> str:
    """A plot in a file of its own, with ``title`` and ``caption`` above the frame.

    The file is self-contained, its text is text, and it follows the reader's light or dark mode.
    """
    height = top + frame_height + 52
    frame = tag("svg", *parts, x=LEFT, y=top, width=WIDTH - LEFT - RIGHT, height=frame_height, overflow="visible")
    drawing = tag(
        "svg",
        tag("title", title, id="t"),
        tag("desc", description or caption, id="d"),
        tag("style", Markup(_style())),
        tag("rect", class_="page", width=WIDTH, height=height, rx=6),
        tag("text", title, class_="title", x=LEFT, y=30),
        tag("text", caption, class_="tick", x=LEFT, y=52),
        frame,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_labelledby="t d",
    )
    return f"{drawing}\n"


def _style() -> str:
    """``figure.css`` with its variables replaced by values, because few viewers but browsers support them."""
    css = STYLE_FILE.read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    )
    rules = css[css.index(".m0 {") :]
    coloured = "".join(f"{rule}\n" for rule in rules.splitlines() if "var(" in rule)
    variable = re.compile(r"var\(--([\w-]+)\)")
    in_dark = variable.sub(lambda found: dark[found[1]], coloured)
    return f"{variable.sub(lambda found: light[found[1]], rules)}@media (prefers-color-scheme: dark) {{\n{in_dark}}}\n"


def text_box(x: float, baseline: float, text: str, anchor: str) -> Box:
    width = LETTER * len(text)
    left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
    return left, baseline - LINE + 3, left + width, baseline + 3


def place_text(point: Point, text: str, places: Iterable[Place], taken: Sequence[Box], within: Box) -> Place:
    """The first of ``places`` around ``point``, in pixels, where ``text`` overlaps least with ``taken``.

    The area outside ``within`` counts as taken.
    """

    def met(place: Place) -> float:
        box = text_box(point[0] + place[0], point[1] + place[1], text, place[2])
        outside = (box[2] - box[0]) * (box[3] - box[1]) - shared_area(box, within)
        return outside + sum(shared_area(box, other) for other in taken)

    return min(places, key=met)


def shared_area(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")
