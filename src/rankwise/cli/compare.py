"""``rankwise compare``: every method on the same model and data, then one recommendation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group

from rankwise.cli.options import Command
from rankwise.comparison.settings import CompareSettings, check_compare
from rankwise.evaluation.tasks.names import retained_from
from rankwise.records import write_text
from rankwise.reports import summary
from rankwise.reports.comparison import REPORT_FILE, Comparison
from rankwise.reports.numbers import duration, estimate, plural
from rankwise.reports.words import heading, headline, method_name, metric_name, stayed
from rankwise.verbs.output import Document, Output, light_table, titled
from rankwise.verbs.settings import check_paths

if TYPE_CHECKING:
    from rankwise.comparison.pool import Picture
    from rankwise.comparison.stages import Job, Outcome


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


def run(settings: CompareSettings, output: Output) -> Document:
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
    report(comparison, output)
    return comparison.document


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
    return titled("Means over seeds; the report has every figure", table)


def verdict_lines(comparison: Comparison) -> Iterator[str]:
    """A line for each method against the best. The difference is that of the method named first minus the other one.
    Then a line for each method against the base, if there are rows that must stay.
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


COMMAND = Command(
    name="compare",
    settings=CompareSettings,
    run=run,
    summary="Compare methods on your model and data: several seeds, intervals, one recommendation.",
    examples=(
        "rankwise compare --model demo --data rows.jsonl --time 2h --output comparison",
        "rankwise compare --model demo --data train.csv --eval-data dev.csv \\",
        "    --methods lora,dora --learning-rates 1e-4,2e-4,5e-4 --output comparison",
    ),
)
