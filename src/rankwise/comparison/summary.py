"""``comparison.json`` out of the runs: means, intervals, differences, groups, recommendation."""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.comparison.collect import metrics_of, scores_of
from rankwise.comparison.recommendation import pareto_points, pareto_set
from rankwise.comparison.schedule import Plan, state_of
from rankwise.comparison.schema import Difference, Method, RateSearch, Run
from rankwise.comparison.statistics import mean_of_seeds
from rankwise.comparison.verdicts import Scores, compare_all, tie_groups
from rankwise.reports.merging import ranges_of
from rankwise.serving import served


def scores_by_metric(plan: Plan, runs: Sequence[Run]) -> dict[str, dict[str, Scores]]:
    """Metric -> method -> scores of its final runs."""
    final = {
        method: [run for run in runs if run["method"] == method and run["phase"] == "final" and is_good(run)]
        for method in plan.methods
    }
    found: dict[str, dict[str, Scores]] = {}
    for metric in metrics_of(runs):
        scores = {method: scores_of(plan.output, own, metric) for method, own in final.items()}
        found[metric] = {method: item for method, item in scores.items() if item is not None}
    return found


def is_good(run: Run) -> bool:
    return run["status"] == "finished"


def all_differences(
    scores: Mapping[str, Mapping[str, Scores]], better: Mapping[str, bool], margin: float
) -> list[Difference]:
    return [
        difference
        for metric, methods in scores.items()
        for difference in compare_all(metric, methods, higher_is_better=better[metric], relative_margin=margin)
    ]


def all_methods(
    plan: Plan,
    runs: Sequence[Run],
    scores: Mapping[str, Mapping[str, Scores]],
    differences: Sequence[Difference],
    *,
    metric: str,
) -> dict[str, Method]:
    """A row of the table per method, the skipped ones included."""
    better = metrics_of(runs)
    methods = {name: _method(plan, name, runs, scores, better) for name in plan.methods}
    primary = [item for item in differences if item["metric"] == metric]
    points = pareto_points(methods, metric)
    best = pareto_set(points, higher_is_better=better.get(metric, False))
    order = sorted(
        (point["method"] for point in points),
        key=lambda name: -methods[name]["mean"][metric] if better.get(metric, False) else methods[name]["mean"][metric],
    )
    groups = tie_groups(order, primary)
    for name, method in methods.items():
        method["group"], method["pareto"] = groups.get(name), name in best
    return methods


def searches(plan: Plan) -> dict[str, RateSearch]:
    return {method: state_of(plan, method).search for method in plan.methods}


def _method(
    plan: Plan,
    name: str,
    runs: Sequence[Run],
    scores: Mapping[str, Mapping[str, Scores]],
    better: Mapping[str, bool],
) -> Method:
    state = state_of(plan, name)
    own = [run for run in runs if run["method"] == name and run["phase"] == "final"]
    good = [run for run in own if is_good(run)]
    estimates = {
        metric: mean_of_seeds([by_method[name].values[seed] for seed in sorted(by_method[name].values)])
        for metric, by_method in scores.items()
        if name in by_method
    }
    intervals = {metric: estimate.interval() for metric, estimate in estimates.items()}
    records = [run["record"] or {} for run in good]
    return {
        "mean": {metric: estimate.mean for metric, estimate in estimates.items()},
        "interval": {metric: None if pair is None else list(pair) for metric, pair in intervals.items()},
        "seed_sd": {metric: estimate.seed_sd for metric, estimate in estimates.items()},
        "per_seed": {
            metric: {str(seed): scores[metric][name].values[seed] for seed in sorted(scores[metric][name].values)}
            for metric in estimates
        },
        "higher_is_better": {metric: better[metric] for metric in estimates},
        "seeds": len(good),
        "failed": len([run for run in own if run["status"] == "failed"]),
        "learning_rate": state.final[0].learning_rate if state.final else None,
        "learning_rate_at_edge": state.search["at_edge"],
        "tokens_per_second": _mean(records, "tokens_per_second"),
        "examples_per_second": _mean(records, "examples_per_second"),
        "peak_memory_bytes": _largest(records, "peak_memory_bytes"),
        "predicted_peak_memory_bytes": _largest(records, "predicted_peak_memory_bytes"),
        "wall_seconds": _mean(records, "wall_seconds"),
        "ranges": ranges_of(records),
        "trainable_parameters": _largest(records, "trainable_parameters"),
        "adapter_bytes": max((run["adapter_bytes"] for run in good if run["adapter_bytes"]), default=None),
        "group": None,
        "pareto": False,
        "serving": list(served(name, records[0].get("settings") or {} if records else {})),
        "skipped": f"{state.skipped['code']}: {state.skipped['message']}" if state.skipped else None,
    }


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [float(record[key]) for record in records if record.get(key) is not None]
    return plain.fmean(values) if values else None


def _largest(records: Sequence[Mapping[str, Any]], key: str) -> int | None:
    return max((int(record[key]) for record in records if record.get(key) is not None), default=None)
