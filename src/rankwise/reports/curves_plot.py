"""Loss curves of every run on one scale. Each method has a panel: its seeds in colour, other methods in grey."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from rankwise.reports.figure import Frame, group, label
from rankwise.reports.folder import Comparison
from rankwise.reports.losses import Losses
from rankwise.reports.naming import method_name
from rankwise.reports.numbers import plural, rate
from rankwise.reports.scale import Point, robust_range, thinned

HEIGHT = 190
# Share of the first steps that the scale of the losses ignores, unless a curve has few points.
START, FEW_POINTS = 0.15, 4


@dataclasses.dataclass(frozen=True)
class Curve:
    """The losses of one run. The training loss is drawn for final runs only, and is smoothed."""

    method: str
    seed: int
    learning_rate: float | None
    is_final: bool
    losses: Losses

    @property
    def training(self) -> Sequence[Point]:
        return thinned(self.losses.smooth) if self.is_final else []

    @property
    def evaluation(self) -> Sequence[Point]:
        return self.losses.evaluation

    @property
    def tip(self) -> str:
        return f"{method_name(self.method)}, seed {self.seed}, learning rate {rate(self.learning_rate)}"


def curves_of(comparison: Comparison) -> list[Curve]:
    """The curves of all runs that left metrics, failed ones included."""
    found = []
    for run in comparison["runs"]:
        lines = comparison.metrics_of(run) if run["folder"] else []
        losses = Losses.of(lines, (run["record"] or {}).get("kept_step"))
        if losses.training or losses.evaluation:
            found.append(Curve(run["method"], run["seed"], run["learning_rate"], run["phase"] == "final", losses))
    return found


def curve_panels(curves: Sequence[Curve], order: Sequence[str], numbers: Mapping[str, int]) -> list[Markup]:
    """One SVG for each method that has a curve, in ``order``."""
    frame = _frame(curves)
    methods = [name for name in order if any(curve.method == name for curve in curves)]
    return [_panel(name, curves, frame, numbers) for name in methods]


def is_cut(curves: Sequence[Curve]) -> bool:
    """Whether an evaluation lies above the scale."""
    high = _frame(curves).y.high
    return any(loss > high for curve in curves for _, loss in curve.evaluation)


def _frame(curves: Sequence[Curve]) -> Frame:
    """The frame of the plot. Its scale leaves out the first fall of the loss, which would compress the rest."""
    last = max((curve.losses.last_step for curve in curves), default=1)
    settled = [
        loss
        for curve in curves
        for points in (curve.training, curve.evaluation)
        for step, loss in points
        if step >= START * last or len(points) < FEW_POINTS
    ]
    return Frame.of((0, max(last, 1)), robust_range(settled, []), HEIGHT)


def _panel(method: str, curves: Sequence[Curve], frame: Frame, numbers: Mapping[str, int]) -> Markup:
    own = [curve for curve in curves if curve.method == method]
    others = [curve for curve in curves if curve.method != method and curve.is_final]
    finals = [curve for curve in own if curve.is_final]
    description = f"Loss against step of {plural(len(own), 'run')} of {method_name(method)}"
    return frame.svg(
        description,
        frame.grid(),
        frame.steps(),
        *(frame.curve(curve.evaluation, "ghost") for curve in others),
        group(f"m{numbers[method]}", *(_draw(curve, frame) for curve in own), _best_label(finals, frame)),
        below=26,
        right=16,
    )


def _draw(curve: Curve, frame: Frame) -> Markup:
    if not curve.is_final:
        return frame.curve(curve.evaluation, "search", curve.tip)
    parts = [frame.curve(curve.training, "training", curve.tip), frame.curve(curve.evaluation, "evaluation", curve.tip)]
    parts += [
        frame.dot((step, loss), 2.2, "point", f"{curve.tip}, step {step:,.0f}: {loss:.4f}")
        for step, loss in curve.evaluation
        if loss <= frame.y.high
    ]
    if (best := curve.losses.best) is not None:
        parts.append(frame.dot(best, 6, "ring", f"kept: {curve.tip}"))
    return Markup("").join(parts)


def _best_label(curves: Sequence[Curve], frame: Frame) -> Markup:
    """The label of the lowest kept loss. It stands above the lowest ring, where falling curves leave room."""
    best = min((curve.losses.best for curve in curves if curve.losses.best), key=lambda point: point[1], default=None)
    if best is None:
        return Markup("")
    return label(frame.x(best[0]), frame.y(best[1]) - 14, f"best {best[1]:.3f}", "note halo", dx=6, anchor="end")
