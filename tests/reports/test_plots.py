"""Plots are valid SVG with room for their text, the same twice, readable in light and dark and by colour-blind eyes."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest

from rankwise.reports import plots
from rankwise.reports.page import TEMPLATES
from rankwise.reports.plots import COLOURS, INK, LIMIT, MARKERS, Curve, Losses, Spot, loss_svg

NAME = "{http://www.w3.org/2000/svg}"
METHODS = [
    *("lora", "qlora", "dora", "qdora", "full", "lora+pissa", "qlora+loftq", "lora+rslora", "lora+plus"),
    *("qdora+pissa+plus", "qlora+pissa+plus", "$x$ </svg><script> & a name without an end"),
]
NUMBERS = {name: number for number, name in enumerate(METHODS)}
RATES = (1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 4e-4, 1e-3, 3e-2)


def pair(number: int, **changes: Any) -> dict[str, Any]:
    seeds = {str(seed): 0.01 * seed - 0.02 for seed in range(3)}
    found = {"a": METHODS[10], "b": METHODS[number], "difference": -0.0114, "interval": (-0.02 - 0.01 * number, 0.012)}
    return {**found, "margin": 0.01, "verdict": "cannot tell", "per_seed": seeds, **changes}


def spot(number: int) -> Spot:
    cost = 2 + 0.01 * (number % 5)
    return Spot(METHODS[number], cost, 1.3 + 0.001 * number, (cost - 0.1, cost + 0.1), (1.29, 1.32))


def curve(number: int, points: int = 9) -> Curve:
    losses = [(10.0 * step, 2 + number / 10 + math.exp(-step)) for step in range(points)]
    return Curve(METHODS[number], True, Losses(losses[1:], losses, 20))


def tried(number: int) -> dict[str, Any]:
    trials = [{"learning_rate": x, "value": 2 + number / 100 + abs(math.log10(x) + 4)} for x in RATES]
    return {"tried": trials, "chosen": 1e-4}


def look(seeds: int) -> dict[str, Any]:
    beside = {"b": "lora", "difference": 0.01, "interval": [0.01 - 0.1 / seeds, 0.02 + 0.1 / seeds]}
    return {
        "seeds": seeds,
        "run_seconds": 300.0 * seeds,
        "differences": [{"a": name, **beside} for name in METHODS[1:]],
    }


def lines(count: int = 20) -> list[dict[str, Any]]:
    trained = [{"step": step, "loss": 1 + 2 / step} for step in range(1, count + 1)]
    return [*trained, *({"step": step, "eval_loss": 1.5 + abs(step - 15) / 20} for step in range(0, count + 1, 5))]


ALL = range(len(METHODS))
TITLE = "a $x$ </svg><script> title\x00 \u202e"
PLOTS = {
    "forest": lambda: plots.forest([pair(number) for number in ALL if number != 10]),
    "forest of short names": lambda: plots.forest([pair(0, a="dora", interval=(-0.02, -0.0028))]),
    "cost": lambda: plots.quality_against_cost([spot(number) for number in ALL], NUMBERS, "memory, GB", "loss", 2.2),
    "curves": lambda: plots.curve_panel("dora", 2, [curve(number) for number in ALL], (1.9, 3.0)),
    "standing": lambda: plots.standing([look(seeds) for seeds in (3, 4, 6)], NUMBERS, "lora"),
    "rates": lambda: plots.rates({METHODS[number]: tried(number) for number in ALL}, NUMBERS),
    "loss of a run": lambda: loss_svg(lines(), TITLE),
}
every_plot = pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)


@pytest.fixture
def figures(monkeypatch):
    """The figures behind the plots drawn in a test."""
    found: list[Any] = []
    write = plots.svg_of
    monkeypatch.setattr(plots, "svg_of", lambda figure, *more: (found.append(figure), write(figure, *more))[1])
    return found


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{NAME}text")]


@every_plot
def test_it_is_valid_described_and_the_same_twice(draw, recwarn):
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert root.get("width") is None, "it scales"
    assert draw() == svg
    assert texts(svg)
    assert not list(root.iter(f"{NAME}script"))
    assert "currentColor" in svg
    assert INK not in svg
    assert {item.get("href", "#")[0] for item in root.iter()} == {"#"}
    assert not recwarn.list


@every_plot
def test_no_text_meets_another_or_leaves_the_plot(draw, figures):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    draw()
    (figure,) = figures
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    outside = {
        label
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    shown = [item for item in figure.findobj(Text) if item.get_visible() and item.get_text() and item not in outside]
    boxes = [(item.get_text(), item.get_window_extent(canvas.get_renderer()).padded(-0.6)) for item in shown]
    for text, box in boxes:
        assert figure.bbox.x0 - 1 <= box.x0, text
        assert box.x1 <= figure.bbox.x1 + 1, text
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), f"{a!r} meets {b!r}"


def test_every_method_is_named():
    said = " ".join(texts(PLOTS["forest"]()))
    for method in METHODS[:11]:
        assert plots.method_name(method) in said


def test_methods_differ_in_colour_and_shape():
    assert len(COLOURS) == 12
    assert len({plots.swatch(number) for number in range(len(COLOURS) * len(MARKERS))}) == 156


@pytest.mark.parametrize(("points", "joined"), [(2, False), (3, True)])
def test_two_points_are_no_curve(points, joined, figures):
    plots.curve_panel("lora", 0, [curve(0, points)], (1.9, 3.2))
    styles = {line.get_linestyle() for line in figures[0].axes[0].lines if len(line.get_xdata()) == points}
    assert (styles == {"-"}) is joined


def test_learning_rates_stand_on_a_logarithmic_axis_and_a_diverged_one_does_not_flatten_the_others(figures):
    trials = [*tried(0)["tried"], {"learning_rate": 0.1, "value": 9.0}, {"learning_rate": 0.2, "value": math.nan}]
    svg = plots.rates({"lora": {"tried": trials, "chosen": 1e-4}}, NUMBERS)
    assert figures[0].axes[0].get_xscale() == "log"
    assert figures[0].axes[0].get_ylim()[1] < 6
    assert {"1e-5", "1e-4", "▲ off the scale, up to 9.0"} <= set(texts(svg))


def test_rates_far_apart_are_not_drawn_at_the_same_height(figures):
    """Losses of 1.07 and 0.27 beside 0.036: on a logarithmic scale, none of them cut off."""
    trials = [{"learning_rate": x, "value": y} for x, y in ((4e-4, 1.07), (1.3e-3, 0.27), (4e-3, 0.036))]
    svg = plots.rates({"lora": {"tried": trials, "chosen": 4e-3}}, NUMBERS)
    (axes,) = figures[0].axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] > 1.07
    assert {"0.05", "0.1", "0.2", "0.5", "1"} <= set(texts(svg))
    assert not any("off the scale" in text for text in texts(svg))


def test_the_loss_of_a_run_names_its_losses_and_the_kept_step():
    assert {"training, smoothed", "evaluation", "kept: step 15, 1.500", "loss per token"} <= set(
        texts(loss_svg(lines(), "t"))
    )
    assert {"kept: step 20, 1.750", "loss"} <= set(texts(loss_svg(lines(), "t", kept_step=20, objective="dpo")))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 0, "eval_loss": 2.0}],
        [{"step": 1, "loss": None}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}],
        [{"step": step, "loss": 2.0} for step in range(5)],
        [{"step": 1, "loss": 1e9}, {"step": 2, "loss": 1e-9}],
        [{"step": 1, "sample": "text"}],
    ],
)
def test_odd_input_gives_a_plot(rows, recwarn):
    root = ElementTree.fromstring(loss_svg(rows, "<odd> & 'quoted'"))
    assert "nan" not in ElementTree.tostring(root, encoding="unicode").lower()
    assert not recwarn.list


def test_a_spike_does_not_flatten_the_curve(figures):
    """Only its moving average is shown in full."""
    loss_svg([{"step": step, "loss": 500.0 if step == 50 else 1 + step % 2} for step in range(400)], "t")
    assert figures[0].axes[0].get_ylim()[1] < 50


def test_what_is_not_drawn_takes_no_room_in_the_panels():
    """Of runs that tried another learning rate the training loss is not drawn: a bad rate must not press the rest."""
    final = Curve("lora", True, Losses([(1, 2.0), (10, 1.0)], [(0, 2.0), (10, 1.0)], 10))
    bad = Curve("lora", False, Losses([(10, 90.0)], [(0, 2.0), (10, 1.5)], 10))
    without = Curve("lora", False, Losses([], [(0, 2.0), (10, 1.5)], 10))
    assert plots.curve_limits([final, bad]) == plots.curve_limits([final, without])


def test_a_report_imports_no_torch_and_matplotlib_only_to_draw():
    code = "import sys, rankwise.reports.page; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def luminance(colour: str) -> float:
    """WCAG 2.2 relative luminance of ``#rrggbb``."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Ottosson's Oklab, in which a distance of 0.02 is about the least that is seen.


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_every_text_colour_of_a_report_has_contrast(mode):
    """WCAG AA: 4.5 : 1 for text, on the page and on the row of the recommended method."""
    blocks = re.findall(r":root \{(.*?)\}", (TEMPLATES / "report.css").read_text(encoding="utf-8"), re.DOTALL)
    palette = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[mode]))
    for name in ("ink", "quiet", "accent"):
        assert contrast(palette[name], palette["page"]) >= 4.5, name
        assert contrast(palette[name], palette["chosen"]) >= 4.5, name


@pytest.mark.parametrize(("mode", "page"), [(0, "#ffffff"), (1, "#12161b")], ids=["light", "dark"])
def test_marks_stand_out_from_the_page(mode, page):
    """WCAG 1.4.11: 3 : 1 for what a graphic needs."""
    for colours in (*COLOURS, LIMIT):
        assert contrast(colours[mode], page) >= 3, colours
