"""``rankwise report``: the report of a comparison from its records, or of several folders joined. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.cli.options import Verb
from rankwise.cli.output import Output
from rankwise.cli.words import one_line
from rankwise.disk import hold
from rankwise.reports.settings import ReportSettings, output_of

if TYPE_CHECKING:
    from rankwise.comparison.verdicts import Scores


def run(settings: ReportSettings, output: Output) -> Mapping[str, Any]:
    from rankwise.reports.comparison import JSON_FILE, merged_report, write_report
    from rankwise.reports.folder import read_object

    target = output_of(settings)
    with output.waiting("writing the report"), hold(target):
        if len(settings.folders) == 1:
            files = write_report(settings.folders[0], target)
        else:
            files = merged_report(settings.folders, target, _summarise(target))
    found = read_object(target / JSON_FILE)["recommendation"]
    output.line(f"{'verdict':<12}{one_line(str(found.get('reason') or 'none'))}")
    for path in files:
        output.line(f"{'written':<12}{path}")
    return {"files": [str(path) for path in files], "recommendation": found}


def _summarise(target: Path) -> Callable[..., dict[str, Any]]:
    """What the comparison itself computes from runs, for runs that lie in several folders."""

    def summarise(document: Mapping[str, Any], place_of: Callable[[Mapping[str, Any]], Path]) -> dict[str, Any]:
        from rankwise.comparison.collect import metrics_of, scores_of
        from rankwise.comparison.verdicts import compare_all

        runs: list[Any] = [{**run, "folder": str(place_of(run).resolve())} for run in document["runs"]]
        final = [run for run in runs if run["phase"] == "final" and run["status"] == "finished"]
        better = metrics_of(runs)
        scores: dict[str, dict[str, Scores]] = {}
        for metric in better:
            own = {name: [run for run in final if run["method"] == name] for name in document["methods"]}
            found = {name: scores_of(Path(), runs_of, metric) for name, runs_of in own.items()}
            scores[metric] = {name: item for name, item in found.items() if item is not None}
        margin = float(document["settings"].get("margin") or 0.01)
        differences = [
            item
            for metric, by_method in scores.items()
            for item in compare_all(metric, by_method, higher_is_better=better[metric], relative_margin=margin)
        ]
        methods = _methods(document, scores, better, differences)
        recommendation = _recommend(document, runs, methods, differences, better, margin, target)
        return {"methods": methods, "differences": differences, "recommendation": recommendation}

    return summarise


def _methods(
    document: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, Any]],
    better: Mapping[str, bool],
    differences: list[Any],
) -> dict[str, Any]:
    """Each method with the figures of all its runs."""
    from rankwise.comparison.recommendation import pareto_points, pareto_set
    from rankwise.comparison.statistics import mean_of_seeds
    from rankwise.comparison.verdicts import tie_groups
    from rankwise.reports.merging import figures_of

    methods: dict[str, Any] = {}
    for name, facts in document["methods"].items():
        values = {metric: _by_seed(by_method[name]) for metric, by_method in scores.items() if name in by_method}
        means = {metric: mean_of_seeds(list(by_seed.values())) for metric, by_seed in values.items()}
        intervals = {metric: mean.interval() for metric, mean in means.items()}
        methods[name] = {
            **facts,
            **figures_of(document, name),
            "mean": {metric: mean.mean for metric, mean in means.items()},
            "interval": {metric: None if pair is None else list(pair) for metric, pair in intervals.items()},
            "seed_sd": {metric: mean.seed_sd for metric, mean in means.items()},
            "per_seed": values,
            "higher_is_better": {metric: better[metric] for metric in means},
        }
    metric = str(document["primary_metric"])
    points = pareto_points(methods, metric)
    higher = better.get(metric, False)
    best = pareto_set(points, higher_is_better=higher)
    order = sorted((point["quality"] * (-1 if higher else 1), point["method"]) for point in points)
    groups = tie_groups([name for _, name in order], [item for item in differences if item["metric"] == metric])
    return {name: {**facts, "group": groups.get(name), "pareto": name in best} for name, facts in methods.items()}


def _by_seed(scores: Scores) -> dict[str, float]:
    return {str(seed): scores.values[seed] for seed in sorted(scores.values)}


def _recommend(
    document: Mapping[str, Any],
    runs: list[Any],
    methods: Mapping[str, Any],
    differences: list[Any],
    better: Mapping[str, bool],
    margin: float,
    target: Path,
) -> dict[str, Any]:
    """The recommendation over all runs, with its settings written to ``target``."""
    from rankwise.comparison.finish import best_run, recommended_yaml
    from rankwise.comparison.recommendation import recommend
    from rankwise.comparison.schema import RECOMMENDED_FILE
    from rankwise.records import write_text

    metric = str(document["primary_metric"])
    higher = better.get(metric, False)
    limits = document["recommendation"].get("limits") or {}
    found = recommend(
        methods,
        differences,
        metric=metric,
        higher_is_better=higher,
        margin=margin,
        memory_bytes=limits.get("memory_bytes"),
        hours=limits.get("hours"),
    )
    best = best_run(runs, found["method"], metric, higher_is_better=higher) if found["method"] else None
    if best is None or not best["record"]:
        return {**found}
    text = recommended_yaml(target, best["record"]["settings"], found["reason"])
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / RECOMMENDED_FILE, text)
    command = f"rankwise train --config {target / RECOMMENDED_FILE}"
    place = {"config": RECOMMENDED_FILE, "command": command, "run": best["id"], "adapter": best["folder"]}
    return {**found, **place, "config_text": text}


VERB = Verb(
    name="report",
    settings=ReportSettings,
    run=run,
    summary="Write the report of a comparison again, or one report of several folders.",
    examples=(
        "rankwise report runs/comparison",
        "rankwise report runs/laptop runs/server --output runs/report",
    ),
    metavars={"folders": "FOLDER...", "output": "DIR"},
)
