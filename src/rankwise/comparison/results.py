"""The results of a comparison's runs: their records, scores and means, from the files on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rankwise.comparison.stages import LABELS, OWN_TASKS, PERPLEXITY, Cell, Job, Plan, jobs_of, outcome_of, state_of
from rankwise.comparison.statistics import LOOKS, mean_of_seeds
from rankwise.comparison.verdicts import Scores, Spreads, comparable_costs, compare_all, recommend, retentions
from rankwise.config import variant_of
from rankwise.errors import RunError
from rankwise.evaluation.record import EXAMPLES_FILE, RESULT_FILE, read_examples
from rankwise.foreign import Fields, JsonObject, read_object
from rankwise.records import record_of
from rankwise.reports.comparison import (
    EVAL_LOSS,
    EVALUATION_FOLDER,
    RETAINED,
    RETAINED_LOSS,
    TURNED,
    Conclusions,
    Method,
    Phase,
    Retention,
    Run,
    Standing,
    Status,
    figures_of,
)
from rankwise.serving import served_in_short


def collect_runs(plan: Plan) -> list[Run]:
    """Every started run, and one entry for each skipped method."""
    runs = []
    for method in plan.methods:
        state = state_of(plan, method)
        final = {cell.id for cell in state.final}
        for cell in dict.fromkeys([*state.tries, *state.final]):
            if outcome_of(Job("train", cell), plan.output) is not None:
                runs.append(_run(plan, cell, "final" if cell.id in final else "search", state.skipped))
    return runs


def _run(plan: Plan, cell: Cell, phase: Phase, skipped: Mapping[str, str] | None) -> Run:
    folder = cell.folder(plan.output)
    record = record_of(folder)
    known = {} if record is None else record.to_json()
    trained, measured = (outcome_of(job, plan.output) for job in jobs_of(cell))
    errors = [outcome.error for outcome in (trained, measured) if outcome is not None and outcome.error is not None]
    finished = trained is not None and trained.status == "finished"
    stopped = trained is not None and trained.is_interrupted
    status: Status = "finished" if finished else "skipped" if skipped else "interrupted" if stopped else "failed"
    return {
        **known,
        "id": cell.id,
        "method": cell.method,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate or known.get("settings", {}).get("learning_rate"),
        "phase": phase,
        "status": status,
        "alone": trained is not None and trained.alone,
        "error": next(iter(errors), None),
        "folder": folder.relative_to(plan.output).as_posix(),
        "tasks": read_tasks(folder, plan.tasks),
        "adapter_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None,
    }


def read_tasks(folder: Path, tasks: Sequence[str]) -> dict[str, JsonObject]:
    """{task: its result} of ``tasks`` in a run's folder, which may hold further tasks of earlier calls."""
    found = {task: read_json(folder / EVALUATION_FOLDER / task / RESULT_FILE) for task in (*OWN_TASKS, *tasks)}
    return {task: result for task, result in found.items() if result}


def read_json(path: Path) -> JsonObject:
    """A JSON object; empty if there is no file."""
    return read_object(path, error=RunError, code="RW593") if path.exists() else {}


def metrics_of(runs: Sequence[Run]) -> dict[str, bool]:
    """{metric: whether higher is better} of the evaluation loss and of the tasks' metrics, without the loss again."""
    found = {EVAL_LOSS: False} if any(run.get("eval_loss") is not None for run in runs) else {}
    for run in runs:
        for task, result in run["tasks"].items():
            if task == RETAINED:
                found[RETAINED_LOSS] = False
            elif task != PERPLEXITY:
                again = "loss" if task == LABELS else None
                better = result["higher_is_better"]
                found |= {f"{task}.{name}": better[name] for name in result["metrics"] if name != again}
    return found


def scores_of(output: Path, runs: Sequence[Run], metric: str) -> Scores | None:
    """The scores of one method's finished final runs on a metric; None if no run has it."""
    values = {run["seed"]: value for run in runs if (value := value_of(run, metric)) is not None}
    if not values:
        return None
    by_seed = {run["seed"]: _examples(output, run, metric) for run in runs if run["seed"] in values}
    first, *others = by_seed.values()
    if first is None or any(other is None or other.ids != first.ids for other in others):
        return Scores(values=values)
    examples = {seed: found.examples[seed] for seed, found in by_seed.items() if found is not None}
    return dataclasses.replace(first, values=values, examples=examples)


def value_of(run: Run, metric: str) -> float | None:
    """A run's value of a metric. The evaluation loss is the measured one if there is one, else the record's."""
    if metric == EVAL_LOSS:
        measured = run["tasks"].get(_task_of_loss(run))
        found = run.get("eval_loss") if measured is None else measured["metrics"]["loss"]
    else:
        task, _, name = metric.partition(".")
        found = run["tasks"].get(task, {}).get("metrics", {}).get(name)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _task_of_loss(run: Run) -> str:
    """The task that measured the evaluation loss row by row."""
    return LABELS if LABELS in run["tasks"] else PERPLEXITY


def _examples(output: Path, run: Run, metric: str) -> Scores | None:
    """The scores of the examples of a run if the metric is a mean over examples; else None."""
    task, _, name = (_task_of_loss(run), ".", "loss") if metric == EVAL_LOSS else metric.partition(".")
    file = output / run["folder"] / EVALUATION_FOLDER / task / EXAMPLES_FILE
    rows = sorted(read_examples(file), key=lambda row: row.id)
    value = value_of(run, metric)
    if value is None or not rows or any(name not in row.scores for row in rows):
        return None
    found = [float(row.scores[name]) for row in rows]
    weights = [float(row.scores["tokens"]) for row in rows] if "tokens" in rows[0].scores else None
    if not math.isclose(np.average(found, weights=weights), value, rel_tol=1e-6, abs_tol=1e-6):
        return None
    clusters = [row.id if row.cluster is None else f"cluster {row.cluster}" for row in rows]
    is_clustered = any(row.cluster for row in rows)
    seed, ids = run["seed"], [row.id for row in rows]
    return Scores(
        values={seed: value},
        examples={seed: found},
        ids=ids,
        weights=weights,
        clusters=clusters if is_clustered else None,
    )


def scores_by_metric(
    output: Path, methods: Iterable[str], runs: Sequence[Run], looks: Sequence[Sequence[str]] = ()
) -> dict[str, dict[str, Scores]]:
    """{metric: {method: scores of its final runs}}. The runs' folders are relative to ``output``."""
    final = {method: [run for run in finals_of(method, runs) if run["status"] == "finished"] for method in methods}
    found: dict[str, dict[str, Scores]] = {}
    for metric in metrics_of(runs):
        scores = {method: scores_of(output, own, metric) for method, own in final.items()}
        found[metric] = {
            method: dataclasses.replace(item, looks=looks) for method, item in scores.items() if item is not None
        }
    return found


def retained_by(
    scores: Mapping[str, Mapping[str, Scores]], place: Path, base: Fields, margin: float
) -> dict[str, Retention]:
    """{method: what it kept of the rows of --retain}; empty without these. ``place``: the folder of the ``base``."""
    measured: Run = {"seed": 0, "folder": place, "tasks": base["tasks"]}
    of_base = scores_of(Path(), [measured], RETAINED_LOSS)
    return {} if of_base is None else retentions(scores.get(RETAINED_LOSS, {}), of_base, relative_margin=margin)


def finals_of(method: str, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run["method"] == method and run["phase"] == "final"]


def all_methods(plan: Plan, runs: Sequence[Run], scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Method]:
    """A row of the table for each method, including the skipped ones. ``conclusions`` adds costs and verdicts."""
    better = metrics_of(runs)
    found: dict[str, Method] = {}
    for name in plan.methods:
        state = state_of(plan, name)
        settings: Fields = next((run.get("settings", {}) for run in finals_of(name, runs)), {})
        found[name] = {
            **method_figures(name, runs, scores, better),  # type: ignore[typeddict-item]
            "learning_rate": state.search["chosen"] if state.final else None,
            "learning_rate_at_edge": state.search["at_edge"],
            "costs": {},
            "verdict": None,
            "serving": list(served_in_short(variant_of(name)[0], settings)),
            "skipped": f"{state.skipped['code']}: {state.skipped['message']}" if state.skipped else None,
        }
    return found


def method_figures(
    name: str, runs: Sequence[Run], scores: Mapping[str, Mapping[str, Scores]], better: Mapping[str, bool]
) -> JsonObject:
    """The figures of a method's final runs: quality by metric, and cost."""
    values = {
        metric: {str(seed): by_method[name].values[seed] for seed in sorted(by_method[name].values)}
        for metric, by_method in scores.items()
        if name in by_method
    }
    estimates = {metric: mean_of_seeds(list(by_seed.values())) for metric, by_seed in values.items()}
    intervals = {metric: estimate.interval() for metric, estimate in estimates.items()}
    return {
        "mean": {metric: estimate.mean for metric, estimate in estimates.items()},
        "interval": {metric: None if pair is None else list(pair) for metric, pair in intervals.items()},
        "per_seed": values,
        "higher_is_better": {metric: better[metric] for metric in estimates},
        **figures_of(finals_of(name, runs)),
    }


def conclusions(
    methods: Mapping[str, Method],
    scores: Mapping[str, Mapping[str, Scores]],
    better: Mapping[str, bool],
    spreads: Spreads,
    retained: Mapping[str, Retention],
) -> Conclusions:
    """The differences, the methods with their costs and verdicts, and the recommendation, by ``spreads.metric``."""
    metric, margin = spreads.metric, spreads.margin
    untuned = {name for name, item in methods.items() if item["learning_rate_at_edge"]}
    differences = [
        difference
        for name, found in scores.items()
        for difference in compare_all(
            name, found, higher_is_better=better[name], relative_margin=margin, untuned=untuned
        )
    ]
    scored, told = scores.get(metric, {}), [item for item in differences if item["metric"] == metric]
    # A method that a look called worse got no more seeds.
    out = {item["b" if item["verdict"] == "better" else "a"] for item in told if item["verdict"] in TURNED}
    counts = [len(item.values) for name, item in scored.items() if not (spreads.looks and name in out)]
    seeds = (min if spreads.looks else max)(counts, default=0)
    effect = spreads.effect(seeds, max((item["comparisons"] for item in told), default=1))
    costs = comparable_costs(methods)
    methods = {name: {**item, "costs": costs[name], "retained": retained.get(name)} for name, item in methods.items()}
    recommendation, verdicts = recommend(
        methods,
        differences,
        metric=metric,
        higher_is_better=better.get(metric, False),
        margin=margin,
        detectable=effect["relative"],
    )
    return {
        "methods": {name: {**item, "verdict": verdicts.get(name)} for name, item in methods.items()},
        "differences": differences,
        "recommendation": recommendation,
        "minimum_detectable_effect": effect,
    }


def standings(
    runs: Sequence[Run], scores: Mapping[str, Scores], found: Conclusions, *, higher_is_better: bool
) -> list[Standing]:
    """What each look saw of the methods beside the one that is best now; empty without looks."""
    told, methods = found["recommendation"], found["methods"]
    untuned, best = [name for name, item in methods.items() if item["learning_rate_at_edge"]], told["best"]
    seen: list[Standing] = []
    for look in LOOKS if any(item.looks for item in scores.values()) else ():
        then = {name: item.first(look) for name, item in scores.items()}
        pairs = compare_all(
            told["metric"], then, higher_is_better=higher_is_better, relative_margin=told["margin"], untuned=untuned
        )
        shown = [item for item in pairs if best in (item["a"], item["b"]) and item["seeds"] == look]
        before = math.fsum(run.get("wall_seconds") or 0.0 for run in runs if run["seed"] < look)
        seen += [{"seeds": look, "run_seconds": before, "differences": shown}] if shown else []
    return seen
