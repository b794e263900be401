"""``rw.evaluate``, and the lines of ``rankwise evaluate``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rankwise.evaluation.settings import EvaluateSettings
from rankwise.foreign import JsonObject
from rankwise.reports.numbers import plural
from rankwise.verbs.output import Output, Shown, light_table, titled
from rankwise.verbs.settings import apart, check_paths, refuse_comparisons, settings_of, takes

if TYPE_CHECKING:
    from rankwise.evaluation.record import TaskResult
    from rankwise.evaluation.run import Evaluation, Given


@takes(EvaluateSettings)
def evaluate(*, tokenizer: Any = None, quiet: bool = False, **options: Any) -> Evaluated:
    """Measure a model and its adapters on tasks as `rankwise evaluate` does, and return the evaluation.

    The keywords are its options. ``model`` may be a model in memory, with its ``tokenizer``; it is measured as it is,
    with its active adapter. ``data`` of the task perplexity may be a ``datasets.Dataset`` or a list of dicts.
    """
    from rankwise.evaluation.run import Given

    options, model, rows = apart(options, tokenizer)
    output = Output()
    output.console.quiet = quiet
    given = Given(model, tokenizer, rows.get("data"))
    return Evaluated(carry_out(settings_of(EvaluateSettings, options), output, given))


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluated(Shown):
    """An evaluation: ``results``, each with the label of its model, ``differences`` and ``folder`` in it."""

    evaluation: Evaluation

    @property
    def metrics(self) -> list[JsonObject]:
        """A dict for each model and task: model, task, and the metrics by name."""
        return [{"model": label, "task": one.task, **one.metrics} for label, one in self.evaluation.results]

    def show(self, output: Output) -> None:
        for task in dict.fromkeys(result.task for _, result in self.evaluation.results):
            print_task(output, task, self.evaluation)


def carry_out(settings: EvaluateSettings, output: Output, given: Given | None = None) -> Evaluation:
    """Evaluate, with lines that say how far it is."""
    from rankwise.evaluation.tasks.names import check_tasks

    refuse_comparisons(settings.adapter)
    check_tasks(settings.task)
    check_paths(model=settings.model if given is None or given.model is None else None, output=settings.output)
    from rankwise.evaluation.run import evaluate

    return evaluate(settings, Watcher(output), given)


LINES_PER_TASK = 10
# {task: the unit that it counts} where the unit is not a question.
UNITS = {"perplexity": "row"}


class Watcher:
    """A line per phase and per tenth of a task."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.shown: dict[str, int] = {}

    def phase(self, text: str) -> None:
        self.output.line(f"{text} ...")

    def progress(self, label: str, done: int, total: int) -> None:
        tenth = LINES_PER_TASK * done // max(1, total)
        if tenth > self.shown.get(label, 0):
            self.shown[label] = tenth
            self.output.line(f"{label}: {done}/{total}")

    def result(self, label: str, result: TaskResult) -> None:
        self.output.line(f"{result.task} on {label}: {figures(result)}")


def figures(result: TaskResult) -> str:
    """``acc 0.412 ± 0.014, acc_norm 0.438 ± 0.015 (1,172 questions)``."""
    parts = [f"{name} {with_error(value, result.standard_errors.get(name))}" for name, value in result.metrics.items()]
    return f"{', '.join(parts)} ({counted(result)})"


def counted(result: TaskResult) -> str:
    """``1,172 questions``, in the unit of the task."""
    return plural(result.count, UNITS.get(result.task, "question"))


def with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def print_task(output: Output, task: str, evaluation: Evaluation) -> None:
    """Print the models side by side, and their paired differences below."""
    results = [(label, result) for label, result in evaluation.results if result.task == task]
    if not results:
        return
    first = results[0][1]
    clustered = f", standard errors clustered by {first.clusters:,} sources" if first.clusters else ""
    table = light_table()
    table.add_column("")
    for label, _ in results:
        table.add_column(label, justify="right")
    higher = {name: up for _, result in results for name, up in result.higher_is_better.items()}
    for name in dict.fromkeys(name for _, result in results for name in result.metrics):
        cells = [
            with_error(result.metrics[name], result.standard_errors.get(name)) if name in result.metrics else "-"
            for _, result in results
        ]
        table.add_row(f"{name} {'↑' if higher.get(name, True) else '↓'}", *cells)
    output.console.print(titled(f"{task}: {counted(first)}{clustered}", table))
    for item in evaluation.differences:
        if item.task != task:
            continue
        bounds = item.interval
        interval = "no interval" if bounds is None else f"95 % [{bounds[0]:+.4f}, {bounds[1]:+.4f}]"
        output.line(f"  {item.a} - {item.b}: {item.metric} {item.difference:+.4f}  {interval}")
    for label, result in results:
        for note in result.notes:
            output.line(f"  {label}: {note}")
