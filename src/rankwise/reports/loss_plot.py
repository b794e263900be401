"""Loss curves of a run, or of several, as one self-contained SVG."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from markupsafe import Markup

from rankwise.foreign import Fields
from rankwise.reports.figure import (
    LEFT,
    MARKERS,
    RIGHT,
    WIDTH,
    Box,
    Frame,
    document,
    group,
    label,
    place_text,
    tag,
)
from rankwise.reports.losses import Losses, loss_name
from rankwise.reports.scale import Point, robust_range, spread

TOP, HEIGHT = 78, 310
LABEL_GAP = 17
# Offsets of the kept step's note from the centre of its ring, the better one first.
NOTE_BELOW = 26
NOTE_OFFSETS = (NOTE_BELOW, -16, -32, 42, -48)
# Free pixels between a note and the curves.
NOTE_GAP = 8
LONGEST_NAME = 18


def loss_svg(
    metrics: Iterable[Fields] | Mapping[str, Iterable[Fields]],
    title: str,
    *,
    kept_step: int | None = None,
    objective: str = "sft",
) -> str:
    """An SVG document of the lines of one ``metrics.jsonl``, or of ``{name: lines}`` to compare several runs.

    The logged training loss is drawn lightly under its moving average, evaluations are points, and a ring marks the
    kept checkpoint (``kept_step``, by default the lowest evaluation). Lines without a loss are ignored. ``objective``
    says what the loss is.
    """
    if isinstance(metrics, Mapping):
        runs = {name: Losses.of(lines) for name, lines in metrics.items()}
    else:
        runs = {"": Losses.of(metrics, kept_step)}
    several = list(runs.values())
    frame = _frame(several)
    parts = [frame.grid(5), frame.steps(6), *_axis_names(loss_name(objective))]
    if len(several) > 1:
        parts += [
            _run(name, losses, (index % 8, index % 8), frame) for index, (name, losses) in enumerate(runs.items())
        ]
        ends = [(name, losses.smooth or losses.evaluation) for name, losses in runs.items()]
    else:
        (losses,) = several
        raw = group("m0", frame.curve(losses.training, "training"))
        parts += [raw, _run("", losses, (0, 1), frame), _note(losses, frame)]
        ends = [("training", losses.smooth), ("evaluation", losses.evaluation)]
    return document(TOP, HEIGHT, title, _caption(several), *parts, *_end_labels(ends, frame))


def _frame(runs: Sequence[Losses]) -> Frame:
    shown = [loss for losses in runs for _, loss in [*losses.smooth, *losses.evaluation]]
    noisy = [loss for losses in runs for _, loss in losses.training]
    low, high = robust_range(shown, noisy)
    if len(runs) == 1 and runs[0].best is not None:
        # Room for the note below the ring.
        share = (NOTE_BELOW + NOTE_GAP) / HEIGHT
        low = min(low, (runs[0].best[1] - share * high) / (1 - share))
    last = max((losses.last_step for losses in runs), default=1)
    return Frame.of((0, max(last, 1)), (low, high), HEIGHT)


def _axis_names(loss: str) -> Iterator[Markup]:
    yield label(50, HEIGHT + 42, "optimizer step", "tick", anchor="middle")
    turned = f"translate({16 - LEFT} {HEIGHT / 2:.0f}) rotate(-90)"
    yield tag("text", loss, class_="tick", text_anchor="middle", transform=turned)


def _run(name: str, losses: Losses, colours: tuple[int, int], frame: Frame) -> Markup:
    """The smoothed training loss in the first colour, the evaluations in the second."""
    dots = [
        frame.dot((step, loss), 3.6, "dot", f"{name} step {step:,.0f}: evaluation loss {loss:.4f}".strip())
        for step, loss in losses.evaluation
    ]
    ring = [frame.dot(losses.best, 7.5, "ring")] if losses.best else []
    training, evaluation = (f"m{index % len(MARKERS)}" for index in colours)
    return group(training, frame.curve(losses.smooth, "smooth")) + group(
        evaluation, frame.curve(losses.evaluation, "thread"), *dots, *ring
    )


def _note(losses: Losses, frame: Frame) -> Markup:
    """The label of the kept checkpoint, beside its ring where the curves leave the most room."""
    if losses.best is None:
        return Markup("")
    step, loss = losses.best
    text = f"kept: step {step:,.0f}, {loss:.3f}"
    x, y = _pixel(losses.best, frame)
    sides = [(6, "end"), (-6, "start")] if frame.x(step) >= 50 else [(-6, "start"), (6, "end")]
    places = [(dx, dy, anchor) for dx, anchor in sides for dy in NOTE_OFFSETS]
    lines = (losses.smooth, losses.training, losses.evaluation)
    taken = [box for line in lines for box in _boxes(line, frame)]
    within = (-6.0, 0.0, WIDTH - LEFT - RIGHT + 6.0, HEIGHT - NOTE_GAP / 2)
    dx, dy, anchor = place_text((x, y), text, places, taken, within)
    return group("m1", label(frame.x(step), y + dy, text, "note halo", dx=dx, anchor=anchor))


def _pixel(point: Point, frame: Frame) -> Point:
    return frame.x(point[0]) / 100 * (WIDTH - LEFT - RIGHT), frame.y(point[1])


def _boxes(points: Sequence[Point], frame: Frame) -> Iterator[Box]:
    """Boxes around the line through ``points``, every few pixels."""
    for (x, y), (next_x, next_y) in itertools.pairwise(_pixel(point, frame) for point in points):
        count = max(1, round((next_x - x) / 4))
        for index in range(count + 1):
            across, down = x + index / count * (next_x - x), y + index / count * (next_y - y)
            yield across - 2, down - NOTE_GAP / 2, across + 2, down + NOTE_GAP / 2


def _end_labels(ends: Sequence[tuple[str, Sequence[Point]]], frame: Frame) -> Iterator[Markup]:
    """The names of the lines at their right ends, in their colours, which makes a legend unnecessary."""
    known = [(index, name, frame.y(points[-1][1])) for index, (name, points) in enumerate(ends) if points]
    heights = spread([y for _, _, y in known], LABEL_GAP, 0, HEIGHT)
    for y, (index, name, _) in zip(heights, known):
        short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        yield group(f"m{index % len(MARKERS)}", label(100, y + 4, short, "name", dx=12))


def _caption(runs: Sequence[Losses]) -> str:
    if len(runs) > 1:
        return "lines: training loss, smoothed; points: evaluation; ring: lowest evaluation"
    (losses,) = runs
    parts = []
    if losses.training:
        parts.append(f"training {losses.smooth[0][1]:.3f} → {losses.smooth[-1][1]:.3f} (line: smoothed)")
    if losses.evaluation:
        first, best = losses.evaluation[0], losses.best or losses.evaluation[-1]
        parts.append(f"evaluation {first[1]:.3f} → {best[1]:.3f} (points)")
    return "; ".join(parts) or "nothing was logged"
