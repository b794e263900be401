"""``rankwise evaluate``: tasks on a base model and its adapters, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankwise.cli.options import Command
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.reports.numbers import plural
from rankwise.verbs.output import Document, Output, light_table, titled
from rankwise.verbs.settings import check_paths, refuse_comparisons

if TYPE_CHECKING:
    from rankwise.evaluation.record import TaskResult
    from rankwise.evaluation.run import Evaluation

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


def run(settings: EvaluateSettings, output: Output) -> Document:
    from rankwise.evaluation.tasks.names import check_tasks

    refuse_comparisons(settings.adapter)
    check_tasks(settings.task)
    check_paths(model=settings.model, output=settings.output)
    from rankwise.evaluation.run import evaluate

    evaluation = evaluate(settings, Watcher(output))
    for task in settings.task:
        print_task(output, task, evaluation)
    output.line(f"{'written':<12}{evaluation.folder}  (result.json and predictions.jsonl of each task)")
    return {
        "output": str(evaluation.folder),
        "results": [{"label": label, **result.to_json()} for label, result in evaluation.results],
        "differences": [difference.to_json() for difference in evaluation.differences],
    }


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


COMMAND = Command(
    name="evaluate",
    settings=EvaluateSettings,
    run=run,
    summary="Measure a model and its adapters on tasks: perplexity, lm-evaluation-harness, and those installed beside.",
    examples=(
        "rankwise evaluate --adapter runs/first --task perplexity --data held-out.jsonl",
        "rankwise evaluate --adapter lora --adapter dora --task e2e --data test.csv",
        "rankwise evaluate --model demo --task arc_challenge --limit 200",
    ),
)
