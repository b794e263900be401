"""Loss curves of every run, one panel a method on one scale: its seeds in colour, the other methods in grey."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from rankwise.reports.figure import Frame, Point, dot, group, label
from rankwise.reports.folder import Comparison
from rankwise.reports.naming import method_name
from rankwise.reports.numbers import is_number, plural, rate
from rankwise.reports.scale import robust_range, smoothed, whole_ticks

HEIGHT = 190
START, FEW_POINTS = 0.15, 4
# Share of the steps that the scale of the losses does not look at, unless a curve has few points.
LONGEST_LINE = 400
# Points of a training curve that are drawn; a long run is thinned, the eye sees no difference.


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run: (step, loss) of the training log, smoothed, and of the evaluations."""

    method: str
    seed: int
    learning_rate: float | None
    is_final: bool
    training: list[Point]
    evaluation: list[Point]
    kept_step: int | None

    @property
    def best(self) -> Point | None:
        """The evaluation of the kept step, else the lowest after the start."""
        trained = [point for point in self.evaluation if point[0] > 0]
        chosen = [point for point in trained if point[0] == self.kept_step]
        return next(iter(chosen), min(trained, key=lambda point: point[1], default=None))

    @property
    def tip(self) -> str:
        return f"{method_name(self.method)}, seed {self.seed}, learning rate {rate(self.learning_rate)}"


def curves_of(comparison: Comparison) -> list[Curve]:
    """The curves of all runs that left metrics, failed ones included."""
    found = []
    for run in comparison["runs"]:
        lines = comparison.metrics_of(run) if run["folder"] else []
        training, evaluation = _points(lines, "loss"), _points(lines, "eval_loss")
        if training or evaluation:
            kept = (run["record"] or {}).get("kept_step")
            final = run["phase"] == "final"
            seed, rate_ = run["seed"], run["learning_rate"]
            found.append(Curve(run["method"], seed, rate_, final, _smooth(training), evaluation, kept))
    return found


def curve_panels(curves: Sequence[Curve], order: Sequence[str], numbers: Mapping[str, int]) -> list[Markup]:
    """One SVG a method that has a curve, in ``order``."""
    frame = _frame(curves)
    methods = [name for name in order if any(curve.method == name for curve in curves)]
    return [_panel(name, curves, frame, numbers) for name in methods]


def is_cut(curves: Sequence[Curve]) -> bool:
    """Whether some evaluation lies above the scale."""
    high = _frame(curves).y.high
    return any(loss > high for curve in curves for _, loss in curve.evaluation)


def _frame(curves: Sequence[Curve]) -> Frame:
    """The first fall of the loss is left out of the scale: it would press together what comes after it."""
    last = max((step for curve in curves for step, _ in [*curve.training, *curve.evaluation]), default=1)
    settled = [
        loss
        for curve in curves
        for points in _drawn(curve)
        for step, loss in points
        if step >= START * last or len(points) < FEW_POINTS
    ]
    return Frame.of((0, max(last, 1)), robust_range(settled, []), HEIGHT)


def _drawn(curve: Curve) -> tuple[list[Point], ...]:
    """Of runs that tried another learning rate the evaluations alone are drawn."""
    return (curve.training, curve.evaluation) if curve.is_final else (curve.evaluation,)


def _panel(method: str, curves: Sequence[Curve], frame: Frame, numbers: Mapping[str, int]) -> Markup:
    own = [curve for curve in curves if curve.method == method]
    others = [curve for curve in curves if curve.method != method and curve.is_final]
    ticks = whole_ticks(int(frame.x.high), 4)
    finals = [curve for curve in own if curve.is_final]
    description = f"Loss against step of {plural(len(own), 'run')} of {method_name(method)}"
    return frame.svg(
        description,
        frame.grid(),
        frame.base(ticks, [f"{tick:,}" for tick in ticks]),
        *(frame.curve(curve.evaluation, "ghost") for curve in others),
        group(f"m{numbers[method]}", *(_draw(curve, frame) for curve in own), _best_label(finals, frame)),
        below=26,
        right=16,
    )


def _draw(curve: Curve, frame: Frame) -> Markup:
    if not curve.is_final:
        return frame.curve(curve.evaluation, "search", curve.tip)
    parts = [frame.curve(curve.training, "training", curve.tip), frame.curve(curve.evaluation, "evaluation", curve.tip)]
    for step, loss in curve.evaluation:
        if loss > frame.y.high:
            continue
        tip = f"{curve.tip}, step {step:,.0f}: {loss:.4f}"
        parts.append(dot(frame.x(step), round(frame.y(loss), 1), 2.2, "point", tip))
    if curve.best is not None:
        parts.append(dot(frame.x(curve.best[0]), round(frame.y(curve.best[1]), 1), 6, "ring", f"kept: {curve.tip}"))
    return Markup("").join(parts)


def _best_label(curves: Sequence[Curve], frame: Frame) -> Markup:
    """The lowest loss that was kept, above the lowest ring: curves that fall leave room there."""
    best = min((curve.best for curve in curves if curve.best), key=lambda point: point[1], default=None)
    if best is None:
        return Markup("")
    return label(frame.x(best[0]), frame.y(best[1]) - 14, f"best {best[1]:.3f}", "note halo", dx=6, anchor="end")


def _points(lines: Sequence[Mapping[str, object]], key: str) -> list[Point]:
    found = [(line.get("step"), line.get(key)) for line in lines]
    return [(float(step), float(loss)) for step, loss in found if is_number(step) and is_number(loss)]


def _smooth(points: Sequence[Point]) -> list[Point]:
    values = smoothed([loss for _, loss in points], len(points) / 12)
    every = math.ceil(len(points) / LONGEST_LINE) or 1
    line = [(step, value) for (step, _), value in zip(points, values)]
    return line[::every] + line[-1:] if every > 1 else line
