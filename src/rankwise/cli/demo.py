"""``make demo``: plan, then compare four methods on the demo model and Python's own docstrings.

Nothing is downloaded: the model is in a package, and the data are the docstrings of the standard library.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from rankwise.cli import compare, plan
from rankwise.cli.generate import Answer, print_answer
from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output
from rankwise.comparison.settings import CompareSettings
from rankwise.config import BASELINES, DEMO, MODEL
from rankwise.foreign import JsonObject
from rankwise.options import Count, Names, Panel, Settings, option
from rankwise.planning.settings import PlanSettings
from rankwise.reports.naming import method_name
from rankwise.reports.numbers import listed

SHOWN = 3
EXAMPLES = Path("evaluation") / "perplexity" / "predictions.jsonl"
_option = functools.partial(option, Panel.OTHER)


class DemoSettings(Settings):
    """The options of ``rankwise demo``. The same command continues a demo that was stopped."""

    output: Annotated[Path, _option("Folder of the comparison.", metavar="DIR")] = Path("runs/demo-comparison")
    model: Annotated[str, _option(MODEL, metavar="M")] = DEMO
    methods: Annotated[Names, _option("Methods to compare.")] = ("lora", "qlora", "dora", "qdora")
    max_steps: Annotated[Count, _option("Optimizer steps of each run.")] = 12
    eval_limit: Annotated[Count, _option("Rows to evaluate on.")] = 24


def run(settings: DemoSettings, output: Output) -> Document:
    output.line(f"{settings.model} learns to say what a Python function does, from its signature alone.")
    chosen = _compare_settings(settings)
    _chapter(output, "1. What fits on this machine?")
    planned = plan.run(_plan_settings(chosen), output)
    named = listed([method_name(method) for method in chosen.methods])
    _chapter(output, f"2. Train: a short run of {named} each")
    comparison = compare.run(chosen, output)
    _chapter(output, "3. What came out? Signatures that no model was trained on, before and after")
    for answer in _answers(comparison, settings.output):
        print_answer(output, answer)
    output.line(comparison["recommendation"]["reason"], style="bold")
    _chapter(output, "4. What next?")
    for label, text in _next_steps(comparison, settings):
        output.line(f"{label:<16}{text}")
    return {"plan": planned, "comparison": comparison}


def _chapter(output: Output, title: str) -> None:
    output.line(f"\n{title}\n", style="bold")


def _next_steps(comparison: Document, settings: DemoSettings) -> Iterator[tuple[str, str]]:
    """Commands for what to do next."""
    found = comparison["recommendation"]
    yield "look", f"{settings.output / 'report.html'} in a browser, or: rankwise board {settings.output.parent}"
    if found["adapter"]:
        yield "talk to it", f"rankwise chat --adapter {settings.output / found['adapter']}"
    yield "your own data", f"rankwise train --model {settings.model} --data my.jsonl --output runs/first"
    yield "a larger model", 'rankwise plan --model meta-llama/Llama-3.1-8B --gpu "RTX 4090"'


def _compare_settings(settings: DemoSettings) -> CompareSettings:
    from rankwise.data.stdlib import STDLIB

    given = {
        "model": settings.model,
        "data": STDLIB,
        "output": settings.output,
        "methods": settings.methods,
        "seeds": 1,
        "learning_rates": (5e-4,),
        "max_steps": settings.max_steps,
        "eval_limit": settings.eval_limit,
        # Evaluated once at the end, since an evaluation takes as long as a step.
        "eval_steps": settings.max_steps,
        "max_length": 160,
    }
    return CompareSettings.model_validate(given)


def _plan_settings(chosen: CompareSettings) -> PlanSettings:
    methods = tuple(name for name in chosen.methods if name not in BASELINES)
    sizes = {"max_length": chosen.max_length, "max_steps": chosen.max_steps}
    return PlanSettings.model_validate({"model": chosen.model, "method": methods, **sizes})


def _answers(comparison: Document, folder: Path) -> Iterator[Answer]:
    """The answers of the base and of the recommended run to the same prompts, from their records."""
    base = _predictions(folder / (comparison["base"]["folder"] or "") / EXAMPLES)
    run_id = comparison["recommendation"]["run"]
    best = next((run for run in comparison["runs"] if run["id"] == run_id), None)
    tuned = _predictions(folder / best["folder"] / EXAMPLES) if best else {}
    asked = [name for name in tuned if name in base][:SHOWN]
    for name in asked:
        yield Answer(tuned[name]["prompt"], base[name]["prediction"], tuned[name]["prediction"])


def _predictions(path: Path) -> JsonObject:
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
    hidden=True,
)
