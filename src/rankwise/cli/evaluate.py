"""``rankwise evaluate``: tasks on a base model and its adapters, side by side."""

from __future__ import annotations

from rankwise.cli.options import Command
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.verbs.evaluate import carry_out, print_task
from rankwise.verbs.output import Document, Output


def run(settings: EvaluateSettings, output: Output) -> Document:
    evaluation = carry_out(settings, output)
    for task in settings.task:
        print_task(output, task, evaluation)
    output.line(f"{'written':<12}{evaluation.folder}  (result.json and predictions.jsonl of each task)")
    return {
        "output": str(evaluation.folder),
        "results": [{"label": label, **result.to_json()} for label, result in evaluation.results],
        "differences": [difference.to_json() for difference in evaluation.differences],
    }


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
