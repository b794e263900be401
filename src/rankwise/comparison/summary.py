"""``comparison.json`` from the runs: means, intervals, differences, groups, recommendation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rankwise.comparison.collect import metrics_of, scores_of
from rankwise.comparison.recommendation import pareto_set
from rankwise.comparison.schedule import Plan, state_of
from rankwise.comparison.statistics import mean_of_seeds
from rankwise.comparison.verdicts import Scores, compare_all, tie_groups
from rankwise.config import variant_of
from rankwise.foreign import Fields, JsonObject
from rankwise.reports.merging import figures_of
from rankwise.reports.schema import Difference, Method, Run
from rankwise.serving import served_in_short


def scores_by_metric(output: Path, methods: Iterable[str], runs: Sequence[Run]) -> dict[str, dict[str, Scores]]:
    """{metric: {method: scores of its final runs}}. The runs' folders are relative to ``output``."""
    final = {method: [run for run in finals_of(method, runs) if run["status"] == "finished"] for method in methods}
    found: dict[str, dict[str, Scores]] = {}
    for metric in metrics_of(runs):
        scores = {method: scores_of(output, own, metric) for method, own in final.items()}
        found[metric] = {method: item for method, item in scores.items() if item is not None}
    return found


def finals_of(method: str, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run["method"] == method and run["phase"] == "final"]


def all_differences(
    scores: Mapping[str, Mapping[str, Scores]], better: Mapping[str, bool], margin: float
) -> list[Difference]:
    return [
        difference
        for metric, methods in scores.items()
        for difference in compare_all(metric, methods, higher_is_better=better[metric], relative_margin=margin)
    ]


def all_methods(plan: Plan, runs: Sequence[Run], scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Method]:
    """A row of the table for each method, including the skipped ones. ``ranked`` adds groups and the Pareto set."""
    better = metrics_of(runs)
    found: dict[str, Method] = {}
    for name in plan.methods:
        state = state_of(plan, name)
        found[name] = {
            **method_figures(name, runs, scores, better),  # type: ignore[typeddict-item]
            "learning_rate": state.search["chosen"] if state.final else None,
            "learning_rate_at_edge": state.search["at_edge"],
            "group": None,
            "pareto": False,
            "serving": list(served_in_short(variant_of(name)[0], settings_of(name, runs))),
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
        "seed_sd": {metric: estimate.seed_sd for metric, estimate in estimates.items()},
        "per_seed": values,
        "higher_is_better": {metric: better[metric] for metric in estimates},
        **figures_of(finals_of(name, runs)),
    }


def settings_of(name: str, runs: Sequence[Run]) -> Fields:
    """The settings of the method's final runs, from the first record."""
    return next(((run["record"] or {}).get("settings") or {} for run in finals_of(name, runs)), {})


def ranked(
    methods: Mapping[str, Method], differences: Sequence[Difference], metric: str, *, higher_is_better: bool
) -> dict[str, Method]:
    """The methods with their tie groups and whether they are in the Pareto set."""
    best = pareto_set(methods, metric, higher_is_better=higher_is_better)
    known = [name for name, item in methods.items() if metric in item["mean"]]
    order = sorted(known, key=lambda name: methods[name]["mean"][metric], reverse=higher_is_better)
    groups = tie_groups(order, [item for item in differences if item["metric"] == metric])
    return {name: {**item, "group": groups.get(name), "pareto": name in best} for name, item in methods.items()}
