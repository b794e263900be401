"""Every plot, drawn by matplotlib as SVG whose text is text: in a report, or in a file of its own.

``plots.mplstyle`` holds the typography. Ink is written as ``currentColor``, and ``DARK`` is the CSS that exchanges the
other colours in dark mode. A plot scales with its place. matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from markupsafe import Markup, escape

from rankwise.foreign import Fields, Json
from rankwise.records import RateSearch
from rankwise.reports.losses import Losses, Point, loss_name
from rankwise.reports.naming import method_name
from rankwise.reports.numbers import MINUS, byte_size, is_number, plural, rate, visible
from rankwise.reports.plotted import Curve, Pair, Range, Spot, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
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
GB = 1e9
# The points of a curve are joined if there are more than this.
FEW = 2
# Share of the first steps that the scale of the losses ignores, unless a curve has few points.
START, FEW_POINTS = 0.15, 4
# Bars are cut at this multiple of the limit, so that one giant does not flatten the rest.
MOST_OF_LIMIT = 2.5


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
def forest(pairs: Sequence[Pair]) -> tuple[Figure, str]:
    """Each method against the best, with a dot for each seed, the mean, its interval, and the margin."""
    names = [f"{_short(method_name(pair.a))} vs {_short(method_name(pair.b))}" for pair in pairs]
    results = [f"{pair.text}  {pair.verdict}" for pair in pairs]
    # Pixels: a second line of text where names and result do not fit on one.
    second = 14 if any(len(name + result) > LETTERS for name, result in zip(names, results)) else 0
    pitch = 44 + second
    figure, axes = _axes(ROWS, 30 + pitch * len(pairs))
    axes.grid(False)
    across = axes.get_yaxis_transform()
    for row, pair in enumerate(pairs):
        top = row * pitch
        weight = "bold" if pair.verdict in ("better", "equivalent") else "normal"
        axes.text(0, top + 11, names[row], transform=across)
        axes.text(1, top + 11 + second, results[row], transform=across, ha="right", weight=weight)
        middle, band = top + second + 27, (top + second + 16, top + second + 42)
        if pair.margin is not None:
            axes.fill_betweenx(band, -pair.margin, pair.margin, color=INK, alpha=0.1, linewidth=0)
        axes.vlines(0, *band, color=INK, alpha=0.5, linewidth=1)
        seeds = list(pair.per_seed.values())
        axes.plot(seeds, [middle + 10] * len(seeds), "o", color=INK, alpha=0.5, markersize=4)
        if pair.interval is not None:
            axes.hlines(middle, *pair.interval, color=INK, linewidth=1.8)
        if pair.difference is not None:
            axes.plot(pair.difference, middle, "o", color=INK, markersize=8)
    axes.set_ylim(pitch * len(pairs), 0)
    axes.set_yticks([])
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=6)
    return figure, "; ".join(f"{method_name(pair.a)} vs {method_name(pair.b)}: {pair.verdict}" for pair in pairs)


@_drawn
def quality_against_cost(
    spots: Sequence[Spot],
    numbers: Numbers,
    cost: str,
    quality: str,
    *,
    higher_is_better: bool,
    limit: float | None,
    limit_name: str = "your limit",
) -> tuple[Figure, str]:
    """A point for each method, bars for the uncertainty, and the Pareto line.

    The line joins the methods that no other one beats in both. It is a step, because no method lies between two.
    ``cost`` and ``quality`` name the axes; ``limit`` is the user's limit, drawn if it lies near the points.
    """
    figure, axes = _axes(PANEL, 290)
    axes.grid(True, axis="x")
    for spot in spots:
        number = numbers[spot.method]
        shade = colour(number)
        axes.hlines(spot.quality, *spot.cost_range, color=shade, linewidth=1.3)
        if spot.quality_range is not None:
            axes.vlines(spot.cost, *spot.quality_range, color=shade, linewidth=1.3)
        axes.plot(spot.cost, spot.quality, marker(number), color=shade, markersize=8)
    axes.margins(0.1)
    low, high = axes.get_xlim()
    if limit is not None and low < limit < high + 0.5 * (high - low):
        axes.axvline(limit, color=LIMIT[0], linestyle="--", linewidth=1.3)
        axes.text(limit, 1, f"{limit_name} ", transform=axes.get_xaxis_transform(), ha="right", va="top")
        high = max(high, limit + 0.03 * (high - low))
    front = pareto_front(spots, higher_is_better=higher_is_better)
    x, y = [spot.cost for spot in front], [spot.quality for spot in front]
    axes.step([*x, high], [*y, y[-1]], where="post", color=INK, alpha=0.6, linewidth=1.2, linestyle=":", zorder=1)
    if all(spot.cost_range[0] >= 0 for spot in spots):
        low = max(low, 0)
    axes.set(xlim=(low, high), xlabel=cost, ylabel=quality)
    return figure, f"{quality} against {cost}"


@_drawn
def memory(methods: Mapping[str, Fields], numbers: Numbers, limit: float | None) -> tuple[Figure, str]:
    """A bar of measured memory for each method, with a mark at the predicted value."""
    figure, axes = _axes(ROWS, 44 + 26 * len(methods))
    for row, (name, facts) in enumerate(methods.items()):
        predicted = facts["predicted_peak_memory_bytes"]
        axes.barh(row, facts["peak_memory_bytes"] / GB, height=0.6, color=colour(numbers[name]))
        if is_number(predicted):
            axes.vlines(predicted / GB, row - 0.42, row + 0.42, color=INK, linewidth=2)
    if limit is not None:
        axes.axvline(limit / GB, color=LIMIT[0], linestyle="--", linewidth=1.3)
    sizes = {name: byte_size(facts["peak_memory_bytes"]) for name, facts in methods.items()}
    _rows(axes, map(method_name, methods), [f"{sizes[name]} {prediction_error(methods[name])}" for name in methods])
    axes.set_xlabel("GB")
    return figure, "; ".join(f"{method_name(name)} {size}" for name, size in sizes.items())


def _rows(axes: Axes, names: Iterable[str], figures: Sequence[str]) -> None:
    """A name at the left of each row and a figure at the right."""
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.set_yticks(range(len(figures)), [_short(name) for name in names])
    axes.set_ylim(len(figures) - 0.4, -0.6)
    for row, text in enumerate(figures):
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center")


def prediction_error(facts: Fields) -> str:
    """``+3.1 %``: predicted over measured, or nothing if one is missing."""
    measured, predicted = facts["peak_memory_bytes"], facts["predicted_peak_memory_bytes"]
    if not is_number(measured) or not is_number(predicted) or not measured:
        return ""
    return f"{100 * (predicted / measured - 1):+.1f} %".replace("-", MINUS)


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


def loss_svg(lines: Iterable[Fields], title: str, *, kept_step: int | None = None, objective: str = "sft") -> str:
    """The losses of one ``metrics.jsonl`` as a file.

    The logged training loss is drawn lightly under its moving average, evaluations are points, and a ring marks the
    kept checkpoint (``kept_step``, by default the lowest evaluation). Lines without a loss are ignored. ``objective``
    says what the loss is.
    """
    return _losses(Losses.of(lines, kept_step), title, loss_name(objective))


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


# Number, name, (rate, loss) by rising rate, and the rate chosen, of a method or a round of short runs.
RateLine = tuple[int, str, Sequence[Point], Json]


def rates(searches: Mapping[str, Fields], numbers: Numbers) -> Markup | None:
    """The losses at the learning rates of a comparison; None if no method tried more than one."""
    lines = [
        (numbers[name], method_name(name), points, search.get("chosen"))
        for name, search in searches.items()
        if (points := _tried(search.get("tried"), "value"))
    ]
    return _rates(lines, "evaluation loss") if any(len(points) > 1 for _, _, points, _ in lines) else None


def search_svg(search: RateSearch, title: str) -> str:
    """The search of ``--learning-rate auto`` as a file: a line for each round. Rates that diverged have no point."""
    rounds = itertools.groupby(search["trials"], key=lambda trial: trial["steps"])
    found = [(steps, points) for steps, trials in rounds if (points := _tried(list(trials), "loss"))]
    lines = [(number, plural(steps, "step"), points, None) for number, (steps, points) in enumerate(found)]
    last = [(*line[:3], search["chosen"]) for line in lines[-1:]]
    rows = plural(search["rows"], "training row")
    caption = f"loss on {rows} that the short runs did not see; chosen: {rate(search['chosen'])}"
    return _rates([*lines[:-1], *last], "loss", title, caption)


def _tried(tried: object, key: str) -> list[Point]:
    trials: Sequence[Fields] = tried if isinstance(tried, Sequence) else []
    pairs = [(trial.get("learning_rate"), trial.get(key)) for trial in trials]
    return sorted((x, value) for x, value in pairs if is_number(x) and x > 0 and is_number(value))


@_drawn
def _rates(lines: Sequence[RateLine], loss: str, title: str = "", caption: str = "") -> tuple[Figure, str]:
    figure, axes = _axes(OWN if title else PANEL, 290, title, caption)
    values = [y for _, _, points, _ in lines for _, y in points]
    # A nearly diverged loss would flatten the others, so its point is drawn at the top.
    low, top = _limits(value for value in values if value <= 2 * min(values))
    for number, name, points, chosen in lines:
        shown = [(x, min(y, top)) for x, y in points]
        style = {"color": colour(number), "marker": marker(number), "label": name, "markersize": 7}
        _line(axes, shown, linewidth=1.3, clip_on=False, **style)
        _ring(axes, next((point for point in shown if point[0] == chosen), None), colour(number))
    axes.set(ylim=(low, top), xscale="log", xlabel="learning rate", ylabel=loss)
    ticks = _apart({x for _, _, points, _ in lines for x, _ in points})
    axes.set_xticks(ticks, [rate(x) for x in ticks])
    axes.minorticks_off()
    if title and lines:
        figure.legend(loc="outside lower left", ncols=len(lines))
    return figure, f"{title}: {caption}" if title else f"{loss} against learning rate"


def _apart(rates: Iterable[float]) -> list[float]:
    """The rates, without those whose labels would meet on a logarithmic axis."""
    ordered = sorted(rates)
    kept = ordered[:1]
    for x in ordered[1:]:
        if math.log(x / kept[-1]) >= 0.11 * math.log(ordered[-1] / ordered[0]):
            kept.append(x)
    return kept


# Name, parts in drawing order in bytes, and the relative error, drawn at the end.
MemoryBar = tuple[str, Mapping[str, int], float]


@_drawn
def memory_svg(
    bars: Sequence[MemoryBar], title: str, caption: str, limit_bytes: int, limit_name: str
) -> tuple[Figure, str]:
    """Stacked bars from top to bottom as a file, with a line at ``limit_bytes`` and the peak at the right."""
    figure, axes = _axes(OWN, 180 + 40 * len(bars), title, caption)
    peaks = [sum(parts.values()) for _, parts, _ in bars]
    largest = max((peak * (1 + error) for peak, (_, _, error) in zip(peaks, bars)), default=1)
    edge = max(min(largest, MOST_OF_LIMIT * limit_bytes), 1.08 * limit_bytes)
    unit, unit_name = (1e9, "GB") if edge >= 0.9995e9 else (1e6, "MB")
    starts = [0.0] * len(bars)
    for number, name in enumerate(dict.fromkeys(name for _, parts, _ in bars for name in parts)):
        sizes = [parts.get(name, 0) / unit for _, parts, _ in bars]
        axes.barh(range(len(bars)), sizes, 0.6, starts, color=colour(number), label=name)
        starts = [start + size for start, size in zip(starts, sizes)]
    limit = f"{_short(visible(limit_name))}: {byte_size(limit_bytes)}"
    axes.axvline(limit_bytes / unit, color=LIMIT[0], linestyle="--", label=limit)
    for row, (peak, (_, _, error)) in enumerate(zip(peaks, bars)):
        if peak > edge:
            axes.plot(edge / unit, row, ">", color=INK, clip_on=False)
        elif error:
            axes.errorbar(peak / unit, row, xerr=peak / unit * error, color=INK, capsize=4, linewidth=1.4)
    errors = [f" ±{100 * error:.0f} %" if error else "" for _, _, error in bars]
    told = [byte_size(peak) + error for peak, error in zip(peaks, errors)]
    names = [name for name, _, _ in bars]
    _rows(axes, names, told)
    axes.set(xlim=(0, edge / unit), xlabel=f"peak memory, {unit_name}")
    figure.legend(loc="outside lower left", ncols=2)
    bars_told = ", ".join(map(" ".join, zip(names, told)))
    return figure, f"{title}: peak memory: {bars_told}; the line is at {byte_size(limit_bytes)}"
