"""What `rankwise board` shows: the runs and comparisons below a folder, as pieces of HTML. Everything is only read."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from rankwise.errors import RankwiseError
from rankwise.foreign import Fields, JsonObject
from rankwise.records import METRICS_FILE, RUN_FILE, RunRecord, load_record, read_metrics
from rankwise.reports.figure import STYLE_FILE, TEMPLATES, Frame, group, line
from rankwise.reports.folder import as_expected, load_comparison
from rankwise.reports.losses import Losses, loss_name, points_of
from rankwise.reports.naming import last_part, method_name
from rankwise.reports.numbers import byte_size, capital, duration, is_number, short_count, significant, visible
from rankwise.reports.page import page, rendered
from rankwise.reports.scale import Point, robust_range, thinned, value_range
from rankwise.reports.schema import COMPARISON_FILE

# Folders of a run or a comparison that hold no run.
NOT_ENTERED = {"checkpoints", "cache", "cells", "merged"}
DEEPEST = 5
# If a run's files have not changed for this time, it was killed, or its steps are very long.
SILENT_SECONDS = 120
# Number of the newest samples and warnings of a run that are shown.
MOST_TEXTS = 12


@dataclasses.dataclass(frozen=True)
class Found:
    """A run folder; ``name`` is its path below the board's folder. ``problem`` says what could not be read."""

    name: str
    folder: Path
    # Seconds since the epoch at which the record or the metrics changed last.
    changed: float
    record: RunRecord | None
    metrics: Sequence[Fields]
    problem: str = ""

    @property
    def state(self) -> str:
        """The record's status. A record that says "running" long after its last line is of a killed run."""
        status = "unreadable" if self.record is None else self.record.status
        silent = time.time() - self.changed
        return f"silent for {duration(silent)}" if status == "running" and silent > SILENT_SECONDS else status

    @property
    def model(self) -> str:
        if self.record is None:
            return ""
        return visible(last_part(self.record.base_model.get("name") or self.record.settings.get("model") or ""))

    @property
    def losses(self) -> Losses:
        return Losses.of(self.metrics, None if self.record is None else self.record.kept_step)


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over the steps, as (class, name, points), and a level to compare them with."""

    title: str
    curves: Sequence[tuple[str, str, Sequence[Point]]]
    limit: float | None = None


def find(root: Path) -> tuple[list[Found], dict[str, Path]]:
    """The runs below ``root``, the newest first, and {name: folder} of the comparisons."""
    runs, comparisons = [], {}
    for folder, files in _folders(root):
        name = str(folder.relative_to(root)) if folder != root else folder.resolve().name
        if RUN_FILE in files:
            runs.append(_found(name, folder))
        if COMPARISON_FILE in files:
            comparisons[name] = folder
    return sorted(runs, key=lambda run: run.changed, reverse=True), comparisons


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for place, names, files in os.walk(root):
        folder = Path(place)
        depth = len(folder.relative_to(root).parts)
        names[:] = sorted(
            name for name in names if depth < DEEPEST and name not in NOT_ENTERED and not name.startswith(".")
        )
        yield folder, files


def _found(name: str, folder: Path) -> Found:
    record, problem = _record(folder, _stamp(folder / RUN_FILE))
    metrics, damage = _metrics(folder, _stamp(folder / METRICS_FILE))
    changed = max(_stamp(folder / file)[0] for file in (RUN_FILE, METRICS_FILE)) / 1e9
    return Found(name, folder, changed, record, metrics, problem or damage)


def _stamp(path: Path) -> tuple[int, int]:
    """A key that changes when the file changes; zeros where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=2048)
def _record(folder: Path, stamp: tuple[int, int]) -> tuple[RunRecord | None, str]:
    try:
        return load_record(folder), ""
    except RankwiseError as error:
        return None, str(error)


@functools.lru_cache(maxsize=2048)
def _metrics(folder: Path, stamp: tuple[int, int]) -> tuple[Sequence[Fields], str]:
    """The lines that can be read, and what is wrong with the first that cannot; the last one may be half-written."""
    lines: list[Fields] = []
    try:
        for item in read_metrics(folder):
            lines.append(item)
    except (RankwiseError, OSError) as error:
        return lines, str(error)
    return lines, ""


def style() -> str:
    """The figures' style and the board's."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (STYLE_FILE, TEMPLATES / "board.css"))


def run_panels(runs: Sequence[Found]) -> list[Markup]:
    """One panel a run. Their charts have the same scales, so that they can be compared by eye."""
    charts = [_charts(run) for run in runs]
    frames = [_frame(alike) for alike in zip(*charts, strict=True)]
    panels = []
    for run, own in zip(runs, charts):
        drawn = [(chart, _draw(chart, frame)) for chart, frame in zip(own, frames)]
        panels.append(rendered("board_run.html", **_content(run), charts=drawn))
    return panels


def overview(runs: Sequence[Found]) -> Markup:
    """A table with a row a run."""
    rows = [(run, _figures(run)) for run in runs]
    return rendered("board_runs.html", rows=rows, age=lambda run: duration(max(0.0, time.time() - run.changed)))


def comparison_panel(folder: Path) -> Markup:
    """The whole report of a comparison, in a sandboxed iframe."""
    try:
        comparison = load_comparison(folder)
        with as_expected(comparison):
            report = page(comparison)
    except RankwiseError as error:
        return Markup('<p class="caution">{}</p>').format(str(error))
    frame = '<iframe class="report" title="Report of {}" sandbox="allow-scripts" srcdoc="{}"></iframe>'
    # The report is passed as str, so that it is escaped in the attribute; Markup would not be.
    return Markup(frame).format(folder.name, str(report))


def _content(run: Found) -> JsonObject:
    record = run.record
    samples = [
        (item.get("step", 0), visible(str(item["sample"]))) for item in run.metrics if item.get("sample") is not None
    ]
    return {
        "run": run,
        "method": "" if record is None else method_name(record.method),
        "facts": [(name, text) for name, text in _figures(run).items() if text],
        "samples": samples[: -MOST_TEXTS - 1 : -1],
        "prompt": "" if record is None else visible(str(record.settings.get("sample_prompt") or "")),
        "warnings": [] if record is None else record.warnings[-MOST_TEXTS:],
    }


def _figures(run: Found) -> dict[str, str]:
    """The run's latest figures as text; a missing figure is empty."""
    record, losses = run.record, run.losses
    settings = {} if record is None else record.settings
    last = run.metrics[-1] if run.metrics else {}
    total = settings.get("max_steps")
    memory, speed = points_of(run.metrics, "peak_memory_bytes"), points_of(run.metrics, "tokens_per_second")
    plan = None if record is None else record.predicted_peak_memory_bytes
    trained = None if record is None else record.trainable_parameters
    against = f" of {byte_size(plan)} planned ({memory[-1][1] / plan:.0%})" if memory and plan else ""
    seconds = points_of(run.metrics, "train_seconds")
    step = f"{last.get('step', 0):,}" + (f" of {total:,}" if is_number(total) else "")
    return {
        "step": step if run.metrics else "",
        "training loss": significant(losses.training[-1][1], 4) if losses.training else "",
        "evaluation loss": _change(losses, of_rewards=record is not None and record.objective == "grpo"),
        "speed": f"{significant(speed[-1][1])} tokens/s" if speed else "",
        "memory": f"{byte_size(memory[-1][1])}{against}" if memory else "",
        "training time": duration(seconds[-1][1]) if seconds else "",
        "trained": f"{short_count(trained)} parameters" if trained else "",
        "data": "" if record is None else visible(str(record.data.get("train", {}).get("source") or "")),
    }


def _change(losses: Losses, *, of_rewards: bool) -> str:
    """From the first evaluation to the best one. ``of_rewards``: the losses are negative mean rewards."""
    if not losses.evaluation:
        return ""
    sign, name = (-1, "reward ") if of_rewards else (1, "")
    start, best = f"{name}{significant(sign * losses.evaluation[0][1], 4)}", losses.best
    return start if best is None else f"{start} → {significant(sign * best[1], 4)} at step {best[0]:,.0f}"


def _charts(run: Found) -> list[Chart]:
    losses, objective = run.losses, "sft" if run.record is None else run.record.objective
    plan = None if run.record is None else run.record.predicted_peak_memory_bytes
    limit = plan / 1e9 if plan else None
    memory = [(step, value / 1e9) for step, value in points_of(run.metrics, "peak_memory_bytes")]
    return [
        Chart(
            f"{capital(loss_name(objective))}: training (line, smoothed) and evaluation (points)",
            [("m0 training", "training", losses.training), ("m0 smooth", "smoothed", losses.smooth),
             ("m1 evaluation", "evaluation", losses.evaluation)],
        ),
        Chart("Peak memory in GB, and the plan (dashed)", [("m2 smooth", "peak", memory)], limit),
        Chart("Tokens per second", [("m7 smooth", "tokens/s", points_of(run.metrics, "tokens_per_second"))]),
        Chart("Norm of the gradient", [("m3 smooth", "gradient", points_of(run.metrics, "grad_norm"))]),
        Chart("Norm of B: how far the adapter has moved", [("m6 smooth", "B", points_of(run.metrics, "b_norm"))]),
    ]  # fmt: skip


def _frame(charts: Sequence[Chart]) -> Frame:
    """The axes of one chart, wide enough for every run that is shown."""
    curves = [points for chart in charts for _, _, points in chart.curves]
    last = max((step for points in curves for step, _ in points), default=1.0)
    limits = [chart.limit for chart in charts if chart.limit is not None]
    if len(charts[0].curves) > 1:
        # The losses of the first steps would compress the later ones.
        shown = [value for chart in charts for _, _, points in chart.curves[1:] for _, value in points]
        return Frame.of((0, max(last, 1)), robust_range(shown, []), 190)
    low, high = value_range([*(value for points in curves for _, value in points), *limits], air=0.1)
    # Memory starts at 0, so that a peak close to its plan looks close.
    return Frame.of((0, max(last, 1)), (0.0 if limits else max(low, 0.0), high), 110)


def _draw(chart: Chart, frame: Frame) -> Markup:
    parts = []
    for class_, name, points in chart.curves:
        colour, kind = class_.split()
        drawn = [point for point in thinned(points) if point[1] <= frame.y.high]
        marked = drawn if kind == "evaluation" else points[-1:] if kind == "smooth" else []
        dots = [
            frame.dot(point, 3, "dot", f"step {point[0]:,.0f}: {name} {significant(point[1], 4)}") for point in marked
        ]
        parts.append(group(colour, frame.curve(drawn, kind), *dots))
    if chart.limit is not None:
        parts.append(line(0, round(frame.y(chart.limit), 1), 100, round(frame.y(chart.limit), 1), "limit"))
    return frame.svg(chart.title, frame.grid(), frame.steps(), *parts, below=26, left=52, right=16)
