"""``rankwise report``: the report of a comparison from its records, or of several folders joined. Needs no torch."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankwise.cli.options import Command
from rankwise.cli.output import Document, Output, one_line
from rankwise.disk import hold
from rankwise.foreign import Fields, JsonObject, read_json
from rankwise.records import check_writable
from rankwise.reports.comparison import Recommendation, unit_of
from rankwise.reports.settings import ReportSettings, output_of
from rankwise.reports.words import headline


def run(settings: ReportSettings, output: Output) -> Document:
    from rankwise.reports.report import JSON_FILE, merged_report, write_report

    target = output_of(settings)
    if settings.output is not None:
        check_writable(target)
    with output.waiting("writing the report"), hold(target):
        if len(settings.folders) == 1:
            files = write_report(settings.folders[0], target)
        else:
            files = merged_report(settings.folders, target, _summarise(target))
    found = read_json(target / JSON_FILE)
    output.line(f"{'verdict':<12}{one_line(headline(found))}")
    for path in files:
        output.line(f"{'written':<12}{path}")
    return {"files": [str(path) for path in files], "recommendation": found["recommendation"]}


def _summarise(target: Path) -> Callable[..., JsonObject]:
    """The function by which the comparison itself summarises runs, for runs in several folders."""

    def summarise(document: Fields, place_of: Callable[[Fields], Path]) -> JsonObject:
        from rankwise.comparison import results
        from rankwise.comparison.results import metrics_of
        from rankwise.comparison.verdicts import Spreads

        runs: list[Any] = [{**run, "folder": str(place_of(run).resolve())} for run in document["runs"]]
        better = metrics_of(runs)
        scores = results.scores_by_metric(Path(), document["methods"], runs)
        methods: JsonObject = {}
        for name, facts in document["methods"].items():
            figures = results.method_figures(name, runs, scores, better)
            methods[name] = {**facts, **figures, "skipped": None if figures["seeds"] else facts["skipped"]}
        metric, settings = str(document["primary_metric"]), document["settings"]
        spreads = Spreads(
            scores.get(metric, {}),
            metric=metric,
            margin=document["recommendation"]["margin"],
            rows=(document["data"].get("eval") or {}).get("rows") or 0,
            is_by_row=bool(unit_of(document)),
        )
        limits, base = document["recommendation"]["limits"], document["base"]
        retained: Any = {}
        if base.get("folder") and settings.get("retain"):
            place = place_of({"id": base["folder"], "folder": base["folder"]})
            retained = results.retained_by(scores, place, base, settings["retain_margin"])
        found = results.conclusions(
            methods,
            scores,
            better,
            spreads,
            retained=retained,
            memory_bytes=limits["memory_bytes"],
            hours=limits["hours"],
        )
        higher = better.get(metric, False)
        return {**found, "recommendation": _with_files(found["recommendation"], runs, target, higher_is_better=higher)}

    return summarise


def _with_files(found: Recommendation, runs: list[Any], target: Path, *, higher_is_better: bool) -> JsonObject:
    """The recommendation over all runs, with its settings written to ``target``."""
    from rankwise.comparison.conclusion import best_run, recommended_yaml
    from rankwise.records import write_text
    from rankwise.reports.comparison import RECOMMENDED_FILE

    method = found["method"]
    best = best_run(runs, method, found["metric"], higher_is_better=higher_is_better) if method else None
    if best is None or not best["record"]:
        return {**found}
    text = recommended_yaml(target, best["record"]["settings"])
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / RECOMMENDED_FILE, text)
    command = shlex.join(["rankwise", "train", "--config", str(target / RECOMMENDED_FILE)])
    place = {"config": RECOMMENDED_FILE, "command": command, "run": best["id"], "adapter": best["folder"]}
    return {**found, **place, "config_text": text}


COMMAND = Command(
    name="report",
    settings=ReportSettings,
    run=run,
    summary="Write the report of a comparison again, or one report of several folders.",
    examples=(
        "rankwise report runs/comparison",
        "rankwise report runs/laptop runs/server --output runs/report",
    ),
)
