"""``make demo``: plan, then compare four methods on the demo model and Python's own docstrings.

Nothing is downloaded: the model lies in a package, the data are the docstrings of the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rankwise.cli import compare, plan
from rankwise.cli.generate import Answer, print_answer
from rankwise.cli.options import Verb
from rankwise.cli.output import Output
from rankwise.comparison.settings import CompareOptions, CompareSettings
from rankwise.config import BASELINES, MANY, Settings, comma_list, read_settings
from rankwise.planning.settings import PlanSettings

SHOWN = 3
STDLIB = "stdlib"
EXAMPLES = Path("evaluation") / "perplexity" / "predictions.jsonl"


class DemoSettings(Settings):
    """The options of ``rankwise demo``. The same command continues a demo that was stopped."""

    output: Path = Field(Path("runs/demo-comparison"), description="Folder of the comparison.")
    model: str = Field("demo", description="Hub id, folder, .gguf file, or `demo`.")
    methods: Annotated[tuple[str, ...], BeforeValidator(comma_list)] = Field(
        ("lora", "qlora", "dora", "qdora"), description="Methods to compare."
    )
    max_steps: int = Field(20, ge=1, le=MANY, description="Optimizer steps of each run.")
    eval_limit: int = Field(32, ge=1, le=MANY, description="Rows to evaluate on.")


def run(settings: DemoSettings, output: Output) -> Mapping[str, Any]:
    output.line(f"{settings.model} learns to say what a Python function does, from its signature alone.\n")
    chosen = _compare_settings(settings)
    output.line("What would fit here:\n")
    planned = plan.run(_plan_settings(chosen), output)
    output.line("\nOne short run of each method, so that they can be compared on this machine:\n")
    comparison = compare.run(chosen, output)
    output.line("\nSignatures that the models were not trained on, before and after:\n")
    for answer in _answers(comparison, settings.output):
        print_answer(output, answer)
    output.line(f"{'report':<12}{settings.output / 'report.html'}")
    output.line(comparison["recommendation"]["reason"], style="bold")
    return {"plan": planned, "comparison": comparison}


def _compare_settings(settings: DemoSettings) -> CompareOptions:
    given = {
        "model": settings.model,
        "data": STDLIB,
        "output": settings.output,
        "methods": settings.methods,
        "seeds": 1,
        "learning_rates": (5e-4,),
        "max_steps": settings.max_steps,
        "eval_limit": settings.eval_limit,
        "eval_steps": max(1, settings.max_steps // 2),
        "max_length": 160,
    }
    return read_settings(CompareSettings, None, given)


def _plan_settings(chosen: CompareOptions) -> PlanSettings:
    shared = chosen.model_dump()
    methods = tuple(name for name in chosen.methods if name not in BASELINES)
    given = {"model": chosen.model, "method": methods, **{name: shared[name] for name in ("max_length", "max_steps")}}
    return read_settings(PlanSettings, None, given)


def _answers(comparison: Mapping[str, Any], folder: Path) -> Iterator[Answer]:
    """What the base and the recommended run wrote to the same prompts, from their records."""
    base = _predictions(folder / (comparison["base"]["folder"] or "") / EXAMPLES)
    run_id = comparison["recommendation"]["run"]
    best = next((run for run in comparison["runs"] if run["id"] == run_id), None)
    tuned = _predictions(folder / best["folder"] / EXAMPLES) if best else {}
    asked = [name for name in tuned if name in base][:SHOWN]
    for name in asked:
        yield Answer(tuned[name]["prompt"], base[name]["prediction"], tuned[name]["prediction"])


def _predictions(path: Path) -> dict[str, Any]:
    """Examples that have an answer, by id."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows if row["prediction"]}


VERB = Verb(
    name="demo",
    settings=DemoSettings,
    run=run,
    summary="Plan and compare four methods on the demo model and Python's own docstrings, in minutes.",
    examples=("rankwise demo",),
    metavars={"output": "DIR", "model": "M"},
    hidden=True,
)
