"""The plot is valid, self-contained, says what it shows, and survives odd input."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest

from rankwise.reports.figure import LEFT, RIGHT, WIDTH
from rankwise.reports.loss_plot import HEIGHT, loss_svg
from rankwise.reports.scale import nice_ticks, robust_range, smoothed, spread, tick_label, whole_ticks

NAME = "{http://www.w3.org/2000/svg}"


def lines(count: int = 20, shift: float = 0.0) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0}]
    for step in range(1, count + 1):
        rows.append({"step": step, "loss": 1 + 2 / step + shift, "learning_rate": 1e-4})
        if step % 5 == 0:
            rows.append({"step": step, "eval_loss": 1.5 + abs(step - 15) / 20 + shift})
    return rows


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{NAME}text")]


def groups(svg: str, name: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter(f"{NAME}g") if element.get("class") == name]


def test_one_run_shows_both_losses_and_the_best_step() -> None:
    svg = loss_svg(lines(), "demo, lora")
    assert {"demo, lora", "training", "evaluation", "optimizer step", "loss per token"} <= set(texts(svg))
    assert "kept: step 15, 1.500" in texts(svg)
    (evaluations,) = (item for item in groups(svg, "m1") if item.find(f"{NAME}circle") is not None)
    assert len([circle for circle in evaluations.iter(f"{NAME}circle") if circle.get("class") == "dot"]) == 5


@pytest.mark.parametrize(("objective", "name"), [("sft", "loss per token"), ("dpo", "loss")])
def test_the_axis_names_the_loss_of_the_objective(objective: str, name: str) -> None:
    assert [text for text in texts(loss_svg(lines(), "t", objective=objective)) if text.startswith("loss")] == [name]


def test_kept_step_may_be_another_than_the_lowest() -> None:
    assert "kept: step 20, 1.750" in texts(loss_svg(lines(), "t", kept_step=20))


def pixels(share: str | None) -> float:
    """Per cent of the plot's width in pixels of the document."""
    return float((share or "").rstrip("%")) / 100 * (WIDTH - LEFT - RIGHT)


def crossing(step: int, at: float) -> list[dict[str, Any]]:
    """Evaluations that fall to 1.3 at step 20, and a training curve that passes ``at`` above or below them."""
    rows = [{"step": at_step, "eval_loss": 1.3 + (20 - at_step) ** 2 / 300} for at_step in range(0, 21, 2)]
    return [*rows, *({"step": at_step, "loss": 1.3 + at + (20 - at_step) ** 2 / 200} for at_step in range(1, step))]


@pytest.mark.parametrize("step", [12, 20, 30])
@pytest.mark.parametrize("at", [-0.12, -0.06, 0.0, 0.03, 0.06, 0.1, 0.2])
def test_the_note_of_the_kept_step_lies_on_no_curve(step: int, at: float) -> None:
    root = ElementTree.fromstring(loss_svg(crossing(step, at), "t", kept_step=20))
    (note,) = (item for item in root.iter(f"{NAME}text") if "note" in item.get("class", ""))
    x, baseline = pixels(note.get("x")) + float(note.get("dx", "")), float(note.get("y", ""))
    left = x if note.get("text-anchor") == "start" else x - 7 * len(note.text or "")
    right = left + 7 * len(note.text or "")
    assert baseline < HEIGHT
    points = [
        (pixels(point.split()[0]), float(point.split()[1]))
        for path in root.iter(f"{NAME}path")
        for point in path.get("d", "").removeprefix("M").split("L")
    ]
    inside = [(px, py) for px, py in points if left <= px <= right and baseline - 10 <= py <= baseline + 2]
    assert inside == []


def test_several_runs_are_named_and_told_apart() -> None:
    svg = loss_svg({"LoRA": lines(), "DoRA": lines(shift=0.2), "a<b & a very long name": lines(shift=0.4)}, "compared")
    assert {"LoRA", "DoRA", "a<b & a very long…"[:18]} <= {text[:18] for text in texts(svg)}
    colours = [re.findall(rf"\.m{index} {{ color: (#\w+); }}", svg) for index in range(3)]
    assert all(len(pair) == 2 for pair in colours), "in light and in dark mode"
    assert len({colour for pair in colours for colour in pair}) == 6
    assert all(groups(svg, f"m{index}") for index in range(3))


def test_it_is_self_contained_and_knows_dark_mode() -> None:
    svg = loss_svg(lines(), "x")
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"(href|src|@import|url\()(?!#plot)", svg.replace("http://www.w3.org/2000/svg", ""))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 5, "eval_loss": 2.0}],
        [{"step": 1, "loss": None}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}],
        [{"step": step, "loss": 2.0} for step in range(5)],
        [{"step": 1, "loss": 1e9}, {"step": 2, "loss": 1e-9}],
        [{"step": 1, "sample": "text"}, {"loss": 3.0}],
    ],
)
def test_odd_input_gives_a_plot_within_its_frame(rows: list[dict[str, Any]]) -> None:
    root = ElementTree.fromstring(loss_svg(rows, "<odd> & 'quoted'"))
    for circle in root.iter(f"{NAME}circle"):
        assert 0 <= pixels(circle.get("cx")) <= 592
        assert 0 <= float(circle.get("cy", "")) <= HEIGHT
    assert "nan" not in ElementTree.tostring(root, encoding="unicode").lower().replace("tabular-nums", "")


def test_a_spike_does_not_flatten_the_curve() -> None:
    low, high = robust_range([1.0, 2.0], [*[1.0, 2.0] * 200, 500.0])
    assert high < 3
    assert low < 1


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.93, 2.61, 5) == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert [tick_label(tick, [1.0, 1.25, 1.5]) for tick in (1.0, 1.25)] == ["1.00", "1.25"]
    assert [tick_label(tick, [0, 20]) for tick in (0, 20)] == ["0", "20"]
    assert whole_ticks(3, 6) == [0, 1, 2, 3]


def test_smoothing_starts_at_the_first_value_and_follows_a_constant() -> None:
    assert smoothed([4.0, 4.0, 4.0], 10) == pytest.approx([4.0] * 3)
    assert smoothed([2.0, 8.0], 5)[0] == 2.0


def test_labels_are_moved_apart_within_bounds() -> None:
    placed = spread([10, 12, 11, 95], 15, 0, 100)
    ordered = sorted(placed)
    assert all(b - a >= 15 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert ordered[-1] <= 100
    assert placed[0] < placed[2] < placed[1]


def test_reports_import_no_torch() -> None:
    code = "import sys, rankwise.reports; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_the_name_of_the_axis_lies_on_no_figure() -> None:
    """Losses that differ in the fourth digit have long tick labels."""
    rows = [{"step": step, "loss": 10.65 - 0.001 * step} for step in range(1, 5)]
    ticks = re.findall(
        r'<text x="0%" y="[\d.]+" dx="(-\d+)" text-anchor="end" class="tick">([^<]+)<', loss_svg(rows, "run")
    )
    assert max(len(text) for _, text in ticks) >= 6
    axis = float(re.search(r"translate\((-?[\d.]+) [\d.]+\) rotate\(-90\)", loss_svg(rows, "run"))[1])
    # 12px figures are 7 wide, and the turned name reaches 5 to the right of its base line.
    assert all(float(x) - 7 * len(text) > axis + 5 for x, text in ticks)
