"""``rankwise plan``, ``compare`` and ``evaluate``, whose work `rankwise.verbs` does, for Python too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rankwise.cli.options import Command
from rankwise.comparison.settings import CompareSettings
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.planning.workload import TRACING, PlanSettings
from rankwise.verbs import compare, evaluate, plan
from rankwise.verbs.output import Document, Output


def run_plan(settings: PlanSettings, output: Output) -> Document:
    with _progress(output) as say:
        planned = plan.carry_out(settings, say, output.waiting)
    planned.show(output)
    return planned.document


@contextmanager
def _progress(output: Output) -> Iterator[Callable[[str], None]]:
    """Shows what is traced: on a terminal in one line that changes, elsewhere only the first that takes long."""
    if output.is_terminal:
        with output.console.status("planning") as status:
            yield status.update
        return
    told: list[str] = []

    def say(line: str) -> None:
        if not told or not line.startswith(TRACING):
            print(line, file=sys.stderr, flush=True)
        told.append(line)

    yield say


PLAN = Command(
    name="plan",
    settings=PlanSettings,
    run=run_plan,
    summary="Say what fits the memory, how long training takes and which method to take. Reads no weights.",
    examples=(
        'rankwise plan --model meta-llama/Llama-3.1-8B --gpu "RTX 4090"',
        "rankwise plan --model demo --memory 24GB --max-length 2048 --save plan.yaml",
    ),
)


def run_compare(settings: CompareSettings, output: Output) -> Document:
    comparison = compare.carry_out(settings, output)
    compare.report(comparison, output)
    return comparison.document


COMPARE = Command(
    name="compare",
    settings=CompareSettings,
    run=run_compare,
    summary="Compare methods on your model and data: several seeds, intervals, one recommendation.",
    examples=(
        "rankwise compare --model demo --data rows.jsonl --time 2h --output comparison",
        "rankwise compare --model demo --data train.csv --eval-data dev.csv \\",
        "    --methods lora,dora --learning-rates 1e-4,2e-4,5e-4 --output comparison",
    ),
)


def run_evaluate(settings: EvaluateSettings, output: Output) -> Document:
    evaluation = evaluate.carry_out(settings, output)
    for task in settings.task:
        evaluate.print_task(output, task, evaluation)
    output.line(f"{'written':<12}{evaluation.folder}  (result.json and predictions.jsonl of each task)")
    return {
        "output": str(evaluation.folder),
        "results": [{"label": label, **result.to_json()} for label, result in evaluation.results],
        "differences": [difference.to_json() for difference in evaluation.differences],
    }


EVALUATE = Command(
    name="evaluate",
    settings=EvaluateSettings,
    run=run_evaluate,
    summary="Measure a model and its adapters on tasks: perplexity, lm-evaluation-harness, and those installed beside.",
    examples=(
        "rankwise evaluate --adapter runs/first --task perplexity --data held-out.jsonl",
        "rankwise evaluate --adapter lora --adapter dora --task e2e --data test.csv",
        "rankwise evaluate --model demo --task arc_challenge --limit 200",
    ),
)
