"""``rw.compare``, and the lines of ``rankwise compare``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group

from rankwise.comparison.settings import CompareSettings, check_compare
from rankwise.data.readers import records_in_memory
from rankwise.errors import ConfigError
from rankwise.evaluation.tasks.names import retained_from
from rankwise.foreign import JsonObject
from rankwise.records import write_text
from rankwise.reports import summary
from rankwise.reports.comparison import BEST_FOLDER, REPORT_FILE, Comparison
from rankwise.reports.numbers import duration, estimate, plural
from rankwise.reports.words import heading, headline, method_name, metric_name, stayed
from rankwise.verbs.output import Output, Shown, light_table, titled
from rankwise.verbs.settings import apart, check_paths, settings_of, takes

if TYPE_CHECKING:
    from rankwise.comparison.pool import Picture
    from rankwise.comparison.stages import Job, Outcome


@takes(CompareSettings)
def compare(*, quiet: bool = False, **options: Any) -> Compared:
    """Compare methods as `rankwise compare` does, each run in a process of its own, and return the comparison.

    The keywords are its options. Rows in memory for ``data`` and ``eval_data`` are written beside ``output``, for these
    processes.
    """
    options, model, rows = apart(options, None)
    if model is not None:
        raise ConfigError("RW112", "rw.compare starts processes, which cannot see a model in memory; give its name.")
    settings = settings_of(CompareSettings, options)
    files = {name: settings.output.with_name(f"{settings.output.name}-{name}.jsonl") for name in rows}
    for name, file in files.items():
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in records_in_memory(rows[name]))
        write_text(file, "\n".join(lines))
    settings = settings.model_copy(update={name: str(file) for name, file in files.items()})
    output = Output()
    output.console.quiet = quiet
    return Compared(carry_out(settings, output))


@dataclasses.dataclass(frozen=True, repr=False)
class Compared(Shown):
    """A comparison, with everything of its report in ``document``."""

    comparison: Comparison

    @property
    def document(self) -> JsonObject:
        return dict(self.comparison.document)

    @property
    def verdicts(self) -> list[JsonObject]:
        """Each method against the best: a, b, difference, interval, verdict."""
        return [dict(item) for item in self.comparison.differences_from_best()]

    @property
    def best(self) -> str:
        """The method that is recommended."""
        return str(self.comparison["recommendation"]["method"])

    @property
    def adapter(self) -> Path:
        return self.comparison.folder / BEST_FOLDER

    def show(self, output: Output) -> None:
        report(self.comparison, output)


def carry_out(settings: CompareSettings, output: Output) -> Comparison:
    """Compare, and write the page of the report."""
    from rankwise.evaluation.tasks.names import check_tasks

    check_compare(settings)
    check_tasks(settings.task)
    _, retained = retained_from(settings.retain)
    check_paths(model=settings.model, data=(settings.data, settings.eval_data, retained), output=settings.output)
    from rankwise.comparison.run import compare
    from rankwise.disk import hold
    from rankwise.reports.page import page

    comparison = compare(settings, Lines(output, by_run=settings.time is not None))
    with hold(settings.output):
        write_text(settings.output / "report.html", page(comparison))
    return comparison


DOING = {"prepare": "preparing", "train": "training", "measure": "measuring"}


class Lines:
    """Prints a line whenever a step of the matrix begins or ends; with ``by_run`` one for each run that was measured,
    with the standings, for the trainings of a search, and for what failed.
    """

    def __init__(self, output: Output, *, by_run: bool = False) -> None:
        self.say, self.by_run = output.line, by_run

    def started(self, job: Job) -> None:
        if not self.by_run:
            self.say(f"{job.id}: {DOING[job.stage]} ...")

    def ended(self, job: Job, outcome: Outcome, picture: Picture) -> None:
        if self.by_run and picture.standing:
            self.say(f"{job.id}: {picture.standing}")
        elif not self.by_run or outcome.status == "failed" or (job.stage == "train" and job.cell and not job.cell.seed):
            self.say(_ended(job, outcome, picture))


def report(comparison: Comparison, output: Output) -> None:
    """Print the table, the verdicts, the recommendation, and the files."""
    output.line()
    output.console.print(table_of(comparison))
    for line in verdict_lines(comparison):
        output.line(line)
    output.line()
    output.line(f"{heading(comparison.document)}. {headline(comparison.document)}", style="bold")
    for label, text in _places(comparison):
        output.line(f"{label:<12}{text}")


def table_of(comparison: Comparison) -> Group:
    """A row for each method, best first, with the cells of the report that fit into 80 columns."""
    table = light_table()
    headings = ("method", metric_name(comparison.metric).lower(), "verdict", "memory", "time a run")
    for place, heading_ in enumerate(headings):
        table.add_column(heading_, justify="left" if place in (0, 2) else "right", no_wrap=place != 1)
    for name in comparison.ranked():
        facts = comparison["methods"][name]
        cells = [
            summary.cell(facts, key) for key in (comparison.metric, "verdict", "peak_memory_bytes", "wall_seconds")
        ]
        table.add_row(method_name(name), *(f"{found.text} {found.note}".strip() for found in cells))
    return titled("Means over seeds; the report has every number", table)


def verdict_lines(comparison: Comparison) -> Iterator[str]:
    """A line for each method against the best. The difference is that of the method named first minus the other one.
    Then a line for each method against the base, if there are retained rows.
    """
    words = {
        "better": "{} is better than {}",
        "worse": "{} is worse than {}",
        "equivalent": "{} and {} are equivalent",
        "cannot tell": "the runs cannot tell {} from {}",
        "not tuned": "{} or {} is not tuned",
    }
    for item in comparison.differences_from_best():
        names = words[item["verdict"]].format(method_name(item["a"]), method_name(item["b"]))
        difference = " ".join(estimate(item["difference"], item["interval"], signed=True)).strip()
        yield f"{names}: difference {difference}"
    for name in comparison.ranked():
        if kept := comparison["methods"][name]["retained"]:
            yield f"{stayed(name, kept)}: loss {summary.change_of(kept)}"


def _places(comparison: Comparison) -> Iterator[tuple[str, str]]:
    found, place = comparison["recommendation"], comparison.folder
    yield "report", f"{place / 'report.html'} and {place / REPORT_FILE}"
    if found["deciding"]:
        yield "to decide", found["deciding"]["command"]
    yield "train again", found["command"]
    yield "adapter", str(place / found["adapter"])


def _ended(job: Job, outcome: Outcome, picture: Picture) -> str:
    doing = DOING[job.stage]
    if outcome.status == "finished":
        what = f"{doing} took {duration(outcome.seconds)}"
    elif outcome.is_interrupted:
        # The run's own advice, --resume, does not continue a comparison.
        what = f"{doing} was interrupted"
    else:
        error = outcome.error or {}
        what = f"{doing} failed: {error.get('code')}: {error.get('message')}"
    left = "" if picture.seconds_left is None else f", about {duration(picture.seconds_left)} left"
    counts = {"failed": picture.failed, "interrupted": picture.interrupted}
    others = "".join(f", {count} {word}" for word, count in counts.items() if count)
    return f"{job.id}: {what}  [{plural(picture.done, 'run')} done{others}, {picture.left} to come{left}]"
