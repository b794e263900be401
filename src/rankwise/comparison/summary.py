"""``comparison.json`` from the runs: means, intervals, differences, verdicts, recommendation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rankwise.comparison.collect import metrics_of, scores_of
from rankwise.comparison.detectable import Spreads
from rankwise.comparison.recommendation import comparable_costs, recommend
from rankwise.comparison.schedule import Plan, state_of
from rankwise.comparison.statistics import mean_of_seeds
from rankwise.comparison.verdicts import Scores, compare_all
from rankwise.config import variant_of
from rankwise.foreign import Fields, JsonObject
from rankwise.reports.merging import figures_of
from rankwise.reports.schema import Conclusions, Method, Run
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


def all_methods(plan: Plan, runs: Sequence[Run], scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Method]:
    """A row of the table for each method, including the skipped ones. ``conclusions`` adds costs and verdicts."""
    better = metrics_of(runs)
    found: dict[str, Method] = {}
    for name in plan.methods:
        state = state_of(plan, name)
        found[name] = {
            **method_figures(name, runs, scores, better),  # type: ignore[typeddict-item]
            "learning_rate": state.search["chosen"] if state.final else None,
            "learning_rate_at_edge": state.search["at_edge"],
            "costs": {},
            "verdict": None,
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


def conclusions(
    methods: Mapping[str, Method],
    scores: Mapping[str, Mapping[str, Scores]],
    better: Mapping[str, bool],
    spreads: Spreads,
    *,
    memory_bytes: int | None,
    hours: float | None,
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
    scored = scores.get(metric, {})
    seeds = max((len(item.values) for item in scored.values()), default=0)
    effect = spreads.effect(seeds, len(scored.keys() - untuned) - 1)
    costs = comparable_costs(methods)
    methods = {name: {**item, "costs": costs[name]} for name, item in methods.items()}
    recommendation, verdicts = recommend(
        methods,
        differences,
        metric=metric,
        higher_is_better=better.get(metric, False),
        margin=margin,
        detectable=effect["relative"],
        memory_bytes=memory_bytes,
        hours=hours,
    )
    return {
        "methods": {name: {**item, "verdict": verdicts.get(name)} for name, item in methods.items()},
        "differences": differences,
        "recommendation": recommendation,
        "minimum_detectable_effect": effect,
    }
