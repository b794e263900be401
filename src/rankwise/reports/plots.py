"""Every plot, drawn by matplotlib as SVG whose text is text: in a report, or in a file of its own.

``plots.mplstyle`` holds the typography. Ink is written as ``currentColor``, and ``DARK`` is the CSS that exchanges the
other colours in dark mode. A plot scales with its place. matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

from markupsafe import Markup, escape

from rankwise.foreign import Fields
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.reports.numbers import estimate, is_number, rate, significant, visible
from rankwise.reports.words import method_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
Point = tuple[float, float]
Range = tuple[float, float]
# Numbers of methods, which choose colour and marker.
Numbers = Mapping[str, int]
STYLE_FILE = Path(__file__).parent / "templates" / "plots.mplstyle"
# Pixels: the width of a plot in a report, of one whose rows have names, and of one in a file of its own.
PANEL, ROWS, OWN = 400, 440, 500
# Letters of a name beside a row, and of both names and the result above a row of the forest.
LONGEST_NAME, LETTERS = 26, 70
INK = "#010203"
# (In light mode, in dark mode) of each method, told apart without full colour vision, and the first four in grey too.
# With the markers any 156 methods differ.
COLOURS = (
    ("#2f62f5", "#6fabf2"),
    ("#c47a16", "#ffb347"),
    ("#174a14", "#cff5b8"),
    ("#862a98", "#a457f2"),
    ("#ab5f81", "#e674b3"),
    ("#9385de", "#e5b4ec"),
    ("#29a460", "#06e4a8"),
    ("#1900cd", "#6877b6"),
    ("#d72710", "#f83f27"),
    ("#20760b", "#039c1d"),
    ("#f243bf", "#fd02c9"),
    ("#95043e", "#8ca562"),
)
LIMIT = ("#b03a12", "#f59a6b")
MARKERS = "osD^vPX<>pdh*"
DARK = "".join(
    f'[style*="{role}: {light}"]{{{role}:{dark}!important}}'
    for light, dark in (*COLOURS, LIMIT)
    for role in ("fill", "stroke")
)
OWN_STYLE = (
    "<style>svg{color:#1c2733;background:#fff}@media (prefers-color-scheme:dark){"
    f"svg{{color:#e6ebf0;background:#12161b}}{DARK}}}</style>"
)
# The points of a curve are joined if there are more than this.
FEW = 2
# Share of the first steps that the scale of the losses ignores, unless a curve has few points.
START, FEW_POINTS = 0.15, 4
# Losses of rates that differ by more than the first factor stand on a logarithmic scale, of the second one at most.
WIDE, LOG_RANGE = 4, 100


class Spot(NamedTuple):
    """The cost and quality of one method, and their ranges; None with one seed."""

    method: str
    cost: float
    quality: float
    cost_range: Sequence[float] | None
    quality_range: Sequence[float] | None


class Curve(NamedTuple):
    """The losses of one run. The training loss is drawn for final runs only, and is smoothed."""

    method: str
    is_final: bool
    losses: Losses

    @property
    def training(self) -> Sequence[Point]:
        return self.losses.smooth if self.is_final else []


@dataclasses.dataclass(frozen=True)
class Losses:
    """The (step, loss) pairs of the training log and of the evaluations."""

    training: Sequence[Point]
    evaluation: Sequence[Point]
    kept_step: int | None = None

    @classmethod
    def of(cls, lines: Iterable[Fields], kept_step: int | None = None) -> Losses:
        rows = list(lines)
        return cls(points_of(rows, "loss"), points_of(rows, "eval_loss"), kept_step)

    @property
    def smooth(self) -> list[Point]:
        values = smoothed([loss for _, loss in self.training], len(self.training) / 12)
        return [(step, value) for (step, _), value in zip(self.training, values)]

    @property
    def best(self) -> Point | None:
        """The evaluation of the kept step, else the lowest one after the start."""
        trained = [point for point in self.evaluation if point[0] > 0]
        chosen = [point for point in trained if point[0] == self.kept_step]
        return next(iter(chosen), min(trained, key=lambda point: point[1], default=None))

    @property
    def last_step(self) -> float:
        return max((step for step, _ in [*self.training, *self.evaluation]), default=1)


def points_of(rows: Iterable[Fields], key: str) -> list[Point]:
    """The (step, value) pairs of ``key``. Lines without a finite value are left out."""
    return [(row["step"], row[key]) for row in rows if is_number(row.get(key))]


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """An exponential moving average over about ``span`` values, corrected for its start."""
    keep = 1 - 2 / (max(span, 1.0) + 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)][0]


def marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def _drawn(draw: Callable[P, tuple[Figure, str]]) -> Callable[P, Markup]:
    """Draw with our style, whatever the user's own is, and return the SVG. ``draw`` gives the figure and a description
    for who cannot see it.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Markup:
        import matplotlib

        with matplotlib.rc_context(fname=STYLE_FILE), warnings.catch_warnings():
            # The reader's own fonts draw the text; the font here only measures it.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            return svg_of(*draw(*args, **kwargs))

    return drawn


def svg_of(figure: Figure, description: str) -> Markup:
    """The figure as an element of a page, the same bytes each time; with its own style if it has a title."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    head, _, body = text.getvalue().partition('xmlns="http://www.w3.org/2000/svg" version="1.1">')
    box = re.findall('viewBox="[^"]*"', head)[0]
    body = re.sub(r">\s+<", "><", re.sub(r"<[^>]*>", _plain_tag, body).strip()).replace(INK, "currentColor")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    root = f'<svg {names} {box} role="img" aria-label="{escape(visible(description))}">'
    return Markup(f"{root}{OWN_STYLE if figure.get_suptitle() else ''}{body}")


def _plain_tag(tag: re.Match[str]) -> str:
    """A tag with two decimals and without the names of groups, which several plots in a page would share."""
    return re.sub(r'<g id="[^"]*"', "<g", re.sub(r"(\.\d\d)\d+", r"\1", tag[0].replace("\n", "")))


def _axes(width: int, height: int, title: str = "", caption: str = "") -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))
    if title:
        lines = f"{_short(visible(title), 76)}\n{textwrap.fill(visible(caption), 76)}"
        figure.suptitle(lines, x=0.01, ha="left", linespacing=1.5)
    return figure, figure.subplots()


def _short(name: str, most: int = LONGEST_NAME) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


@functools.cache
def swatch(number: int) -> Markup:
    """The shape of method ``number`` in its colour, shown before its name."""
    from matplotlib.markers import MarkerStyle

    style: Any = MarkerStyle(marker(number))
    shape = style.get_path().transformed(style.get_transform().scale(12))
    outlines = ("L".join(f"{x:.1f} {-y:.1f}" for x, y in polygon) for polygon in shape.to_polygons(closed_only=False))
    path = f'<path d="{"".join(f"M{outline}Z" for outline in outlines)}" style="fill: {colour(number)}"/>'
    return Markup(f'<svg class="swatch" viewBox="-7 -7 14 14" aria-hidden="true">{path}</svg>')


@_drawn
def forest(differences: Sequence[Fields]) -> tuple[Figure, str]:
    """Each method against the best, with a dot for each seed, the mean, its interval, and the margin."""
    names = [f"{_short(method_name(item['a']))} vs {_short(method_name(item['b']))}" for item in differences]
    texts = [" ".join(estimate(item["difference"], item["interval"], signed=True)) for item in differences]
    results = [f"{text}  {item['verdict']}" for text, item in zip(texts, differences)]
    # Pixels: a second line of text where names and result do not fit on one.
    second = 14 if any(len(name + result) > LETTERS for name, result in zip(names, results)) else 0
    pitch = 44 + second
    figure, axes = _axes(ROWS, 30 + pitch * len(differences))
    axes.grid(False)
    across = axes.get_yaxis_transform()
    for row, item in enumerate(differences):
        top = row * pitch
        weight = "bold" if item["verdict"] in ("better", "equivalent") else "normal"
        axes.text(0, top + 11, names[row], transform=across)
        axes.text(1, top + 11 + second, results[row], transform=across, ha="right", weight=weight)
        middle, band = top + second + 27, (top + second + 16, top + second + 42)
        axes.fill_betweenx(band, -item["margin"], item["margin"], color=INK, alpha=0.1, linewidth=0)
        axes.vlines(0, *band, color=INK, alpha=0.5, linewidth=1)
        seeds = list(item["per_seed"].values())
        axes.plot(seeds, [middle + 10] * len(seeds), "o", color=INK, alpha=0.5, markersize=4)
        if item["interval"] is not None:
            axes.hlines(middle, *item["interval"], color=INK, linewidth=1.8)
        axes.plot(item["difference"], middle, "o", color=INK, markersize=8)
    axes.set_ylim(pitch * len(differences), 0)
    axes.set_yticks([])
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=6)
    return figure, "; ".join(f"{name}: {item['verdict']}" for name, item in zip(names, differences))


@_drawn
def quality_against_cost(
    spots: Sequence[Spot], numbers: Numbers, cost: str, quality: str, margin: float | None = None
) -> tuple[Figure, str]:
    """A point for each method, and bars for the uncertainty. ``cost`` and ``quality`` name the axes; a line is drawn at
    a ``margin`` of the cost that lies near the points.
    """
    figure, axes = _axes(PANEL, 290)
    axes.grid(True, axis="x")
    for spot in spots:
        number = numbers[spot.method]
        shade = colour(number)
        if spot.cost_range is not None:
            axes.plot(spot.cost_range, [spot.quality] * 2, color=shade, linewidth=1.3)
        if spot.quality_range is not None:
            axes.plot([spot.cost] * 2, spot.quality_range, color=shade, linewidth=1.3)
        axes.plot(spot.cost, spot.quality, marker(number), color=shade, markersize=8)
    axes.margins(0.1)
    low, high = axes.get_xlim()
    if margin is not None and low < margin < high + 0.5 * (high - low):
        axes.axvline(margin, color=LIMIT[0], linestyle="--", linewidth=1.3)
        axes.text(margin, 1, "margin ", transform=axes.get_xaxis_transform(), ha="right", va="top")
    axes.set(xlabel=cost, ylabel=quality)
    return figure, f"{quality} against {cost}"


@_drawn
def standing(standings: Sequence[Fields], numbers: Numbers, best: str) -> tuple[Figure, str]:
    """Each method's difference from the one that is best now, with its interval, at each look. A method that is
    worse gets no more seeds, and its line ends.
    """
    figure, axes = _axes(PANEL, 290)
    axes.axhline(0, color=colour(numbers[best]), linewidth=1.3)
    shown: dict[str, list[tuple[float, float, list[float]]]] = {}
    for look in standings:
        for item in look["differences"]:
            name, sign = (item["a"], 1) if item["b"] == best else (item["b"], -1)
            bounds = [sign * bound for bound in item["interval"]]
            shown.setdefault(name, []).append((look["run_seconds"] / 60, sign * item["difference"], bounds))
    # Methods stand side by side.
    step = standings[-1]["run_seconds"] / 60 / (10 * (len(shown) + 1) * len(standings))
    for place, (name, points) in enumerate(shown.items()):
        x, y, bars = zip(*((x + place * step, y, bounds) for x, y, bounds in points))
        axes.vlines(x, *zip(*bars), color=colour(numbers[name]), linewidth=1.3)
        axes.plot(x, y, marker=marker(numbers[name]), color=colour(numbers[name]), markersize=7, linewidth=1)
    axes.margins(0.1)
    axes.set_xlim(left=0)
    axes.set(xlabel="minutes of runs", ylabel=f"difference from {_short(method_name(best))}")
    return figure, f"The standing of {', '.join(map(method_name, shown))} over time"


def curve_limits(curves: Sequence[Curve]) -> Range:
    """The scale of the losses. It leaves out the first fall, which would compress the rest."""
    last = max((curve.losses.last_step for curve in curves), default=1)
    return _limits(
        loss
        for curve in curves
        for points in (curve.training, curve.losses.evaluation)
        for step, loss in points
        if step >= START * last or len(points) < FEW_POINTS
    )


def _limits(values: Iterable[float]) -> Range:
    """The range of ``values`` with a margin on both sides; never empty."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    space = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - space, high + space


@_drawn
def curve_panel(method: str, number: int, curves: Sequence[Curve], limits: Range) -> tuple[Figure, str]:
    """The runs of one method in colour, and the final runs of the others in grey, on the scale of all."""
    figure, axes = _axes(PANEL, 235)
    shade = colour(number)
    for curve in curves:
        if curve.method != method:
            if curve.is_final:
                _line(axes, curve.losses.evaluation, color=INK, alpha=0.16, linewidth=1, zorder=1)
        elif not curve.is_final:
            _line(axes, curve.losses.evaluation, color=shade, alpha=0.75, linewidth=1.1, linestyle="--")
        else:
            _line(axes, curve.training, color=shade, alpha=0.5, linewidth=1)
            _line(axes, curve.losses.evaluation, color=shade, marker="o", markersize=3.5)
            _ring(axes, curve.losses.best, shade)
    _step_axis(axes, max(curve.losses.last_step for curve in curves), limits)
    return figure, f"Loss against step of {method_name(method)}"


def _line(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    """A curve; only the points if there are too few for one."""
    if len(points) <= FEW:
        style = {"marker": "o", "markersize": 4, **style, "linestyle": "none"}
    axes.plot([x for x, _ in points], [y for _, y in points], **style)


def _ring(axes: Axes, point: Point | None, shade: str, label: str | None = None) -> None:
    if point is not None:
        axes.plot(*point, "o", color=shade, markerfacecolor="none", markersize=11, markeredgewidth=1.6, label=label)


def _step_axis(axes: Axes, last: float, limits: Range) -> None:
    space = 0.03 * max(last, 1)
    axes.set(xlim=(-space, max(last, 1) + space), ylim=limits, xlabel="optimizer step")
    axes.locator_params(nbins=5, steps=[1, 2, 2.5, 5, 10])
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def loss_svg(
    lines: Iterable[Fields], title: str, *, kept_step: int | None = None, objective: ObjectiveName = "sft"
) -> str:
    """The losses of one ``metrics.jsonl`` as a file.

    The logged training loss is drawn lightly under its moving average, evaluations are points, and a ring marks the
    kept checkpoint (``kept_step``, by default the lowest evaluation). Lines without a loss are ignored. ``objective``
    says what the loss is.
    """
    return _losses(Losses.of(lines, kept_step), title, OBJECTIVES[objective].loss_name)


@_drawn
def _losses(losses: Losses, title: str, name: str) -> tuple[Figure, str]:
    ends = (("training", losses.smooth, None), ("evaluation", losses.evaluation, losses.best))
    told = [f"{what} {points[0][1]:.3f} → {(end or points[-1])[1]:.3f}" for what, points, end in ends if points]
    caption = "; ".join(told) or "nothing was logged"
    figure, axes = _axes(OWN, 420, title, caption)
    training, evaluation = colour(0), colour(1)
    if losses.training:
        _line(axes, losses.training, color=training, alpha=0.4, linewidth=0.9)
        _line(axes, losses.smooth, color=training, linewidth=2.2, label="training, smoothed")
    if losses.evaluation:
        _line(axes, losses.evaluation, color=evaluation, marker="s", markersize=5, linestyle=":", label="evaluation")
    if losses.best is not None:
        _ring(axes, losses.best, evaluation, f"kept: step {losses.best[0]:,.0f}, {losses.best[1]:.3f}")
    # A spike of the training loss does not flatten the rest.
    noisy = sorted(loss for _, loss in losses.training)
    edge = len(noisy) // 100
    shown = [loss for _, loss in [*losses.smooth, *losses.evaluation]]
    _step_axis(axes, losses.last_step, _limits([*shown, *noisy[edge : len(noisy) - edge]]))
    axes.set_ylabel(name)
    if shown:
        figure.legend(loc="outside lower left", ncols=3)
    return figure, f"{title}: {caption}"


@_drawn
def rates(searches: Mapping[str, Fields], numbers: Numbers) -> tuple[Figure, str]:
    """The losses at the learning rates that methods tried, as a rule all measured in the same way. Rates that diverged
    have no point; a triangle at the top marks one off the scale, which the best two of each method fit.
    """
    figure, axes = _axes(PANEL, 290)
    lines = {name: _same_losses(search["tried"]) for name, search in searches.items()}
    values = [y for points in lines.values() for _, y in points]
    low, top, is_log = _rate_limits([sorted(y for _, y in points) for points in lines.values() if points])
    for name, points in lines.items():
        shade, shape = colour(numbers[name]), marker(numbers[name])
        shown = [(x, min(y, top)) for x, y in points]
        _line(axes, shown, linewidth=1.3, clip_on=False, color=shade, marker="none")
        inside, outside = ([at for at, (_, y) in zip(shown, points) if (y > top) is cut] for cut in (False, True))
        for at, mark in ((inside, shape), (outside, "^")):
            axes.plot([x for x, _ in at], [y for _, y in at], mark, clip_on=False, color=shade, markersize=7)
        _ring(axes, next((point for point in shown if point[0] == searches[name]["chosen"]), None), shade)
    if over := [y for y in values if y > top]:
        axes.set_title(f"▲ off the scale, up to {significant(max(over), 2)}", loc="right", size="medium")
    axes.set(ylim=(low, top), xscale="log", xlabel="learning rate", ylabel="evaluation loss")
    if is_log:
        axes.set_yscale("log")
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(top)))
        steps = [step * 10.0**ten for ten in tens for step in (1, 2, 5)]
        axes.set_yticks([y for y in steps if low <= y <= top], [f"{y:g}" for y in steps if low <= y <= top])
    ticks = _apart({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [rate(x) for x in ticks])
    axes.minorticks_off()
    return figure, "evaluation loss against learning rate"


def _same_losses(tried: Sequence[Fields]) -> list[Point]:
    """(rate, loss) of the rates whose losses were measured alike: one tried beyond the edge may have a whole run's."""
    metrics = [trial.get("metric") for trial in tried]
    usual = max(metrics, key=metrics.count)
    return [
        (trial["learning_rate"], trial["value"])
        for trial in tried
        if trial.get("metric") == usual and is_number(trial["value"])
    ]


def _rate_limits(losses: Sequence[Sequence[float]]) -> tuple[float, float, bool]:
    """(lowest, highest of the scale, whether it is logarithmic) for the sorted losses of each method."""
    values = [y for own in losses for y in own]
    least = min(values, default=1.0)
    most = max([2 * least, *(own[:2][-1] for own in losses)])
    if most <= WIDE * least or least <= 0:
        return *_limits(y for y in values if y <= most), False
    return 0.8 * least, 1.25 * max(y for y in values if y <= LOG_RANGE * least), True


def _apart(rates: Iterable[float]) -> list[float]:
    """The rates, without those whose labels would meet on a logarithmic axis."""
    ordered = sorted(rates)
    kept = ordered[:1]
    for x in ordered[1:]:
        if math.log(x / kept[-1]) >= 0.11 * math.log(ordered[-1] / ordered[0]):
            kept.append(x)
    return kept
