"""The end of a comparison: ``report.json``, recommended settings and the best run."""

from __future__ import annotations

import datetime
import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankwise.comparison import stages
from rankwise.comparison.inputs import Inputs
from rankwise.comparison.results import (
    all_methods,
    collect_runs,
    conclusions,
    metrics_of,
    read_tasks,
    retained_by,
    scores_by_metric,
    standings,
    value_of,
)
from rankwise.comparison.settings import CompareSettings
from rankwise.comparison.stages import Job, Plan, planned_runs, state_of
from rankwise.comparison.statistics import CONFIDENCE
from rankwise.comparison.verdicts import Scores, Spreads, wider_rates
from rankwise.config import TrainSettings
from rankwise.disk import whole_folder
from rankwise.errors import RunError, warn
from rankwise.foreign import Fields, JsonObject, read_json
from rankwise.options import option_words
from rankwise.records import write_json, write_text
from rankwise.reports.comparison import (
    BEST_FOLDER,
    RECOMMENDED_FILE,
    REPORT_FILE,
    Comparison,
    Conclusions,
    DecidingRun,
    Document,
    Message,
    Method,
    Recommendation,
    Run,
)
from rankwise.reports.summary import left_out


def conclude(given: CompareSettings, plan: Plan, inputs: Inputs, told: list[Message]) -> Comparison:
    """Write what follows from the runs into the folder, and return it. Raises RunError: RW584, RW589."""
    runs = collect_runs(plan)
    final = [run for run in runs if run["phase"] == "final"]
    finished = [run for run in final if run["status"] == "finished"]
    if not finished:
        errors = [run["error"] for run in final or runs if run["error"] is not None]
        reason = (
            f"{errors[0]['code']}: {errors[0]['message']}"
            if errors
            else "the time was too short."
            if given.time
            else "nothing was started."
        )
        raise RunError("RW584", f"no run finished: {reason}")
    better = metrics_of(runs)
    try:
        found, scores, spreads = concluded(given, plan)
    except LookupError as error:
        raise RunError("RW589", str(error.args[0])) from None
    for run in finished:
        # A failed measurement has its own warning.
        if run["error"] is None and value_of(run, given.metric) is None:
            warn("RW589", f"{run['id']} trained, but has no finite {given.metric}, so it does not count in its mean.")
    hardware = {f"{run['device'].get('name')}, threads: {run['device'].get('threads')}" for run in finished}
    if len(hardware) > 1:
        devices = "; ".join(sorted(hardware))
        warn("RW595", f"the runs are of different hardware ({devices}): their times, speeds and memory differ.")
    for part in ("train", "eval"):
        data = [run["data"].get(part, {}).get("sha256") for run in finished]
        if len({*data} - {None}) > 1:
            warn("RW591", f"the {part} data changed between the runs; compare again in a different --output.")
    _warn_of_shared_steps(plan)
    recommendation = found["recommendation"]
    best = best_run(finished, recommendation["method"], given.metric, higher_is_better=better[given.metric])
    recommendation = hand_over(given.output, recommendation, best)
    recommendation["deciding"] = _deciding_run(given, plan, inputs, found["methods"], recommendation, spreads)
    first = finished[0]
    document: Document = {
        "command": command_line(given),
        "settings": given.model_dump(mode="json"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": first["versions"],
        "device": first["device"],
        "model": first["base_model"],
        "data": inputs.described,
        "primary_metric": given.metric,
        "confidence": CONFIDENCE,
        "base": base_of(plan),
        "warnings": list({(item["code"], item["message"]): item for item in told}.values()),
        "runs": runs,
        **found,
        "recommendation": recommendation,
        "standings": standings(runs, scores[given.metric], found, higher_is_better=better[given.metric]),
        "learning_rates": {method: state_of(plan, method).search for method in plan.methods},
        "seconds": math.fsum(read_json(path)["seconds"] for path in (plan.output / "cells").glob("*.json")),
    }
    write_json(given.output / REPORT_FILE, {**document})
    comparison = Comparison({**document}, given.output)
    for text in left_out(comparison):
        warn("RW588", text)
    return comparison


def concluded(given: CompareSettings, plan: Plan) -> tuple[Conclusions, dict[str, dict[str, Scores]], Spreads]:
    """(what follows from the runs so far, the scores by metric, their spreads). Raises LookupError without any value of
    the metric that decides."""
    runs = collect_runs(plan)
    scores = scores_by_metric(plan.output, plan.methods, runs, plan.looks)
    if not scores.get(given.metric):
        known = ", ".join(metric for metric, found in scores.items() if found) or "no figures at all"
        raise LookupError(f"no run has a finite value of --metric {given.metric}; there are {known}.")
    spreads = spreads_of(given, scores[given.metric])
    retained = retained_by(scores, plan.output / stages.BASE, base_of(plan), given.retain_margin)
    methods = all_methods(plan, runs, scores)
    return conclusions(methods, scores, metrics_of(runs), spreads, retained), scores, spreads


def base_of(plan: Plan) -> JsonObject:
    base = plan.output / stages.BASE
    return {"tasks": read_tasks(base, plan.tasks), "folder": stages.BASE if base.is_dir() else None}


def spreads_of(given: CompareSettings, scores: Mapping[str, Scores]) -> Spreads:
    """The spreads of ``scores`` on the deciding metric."""
    return Spreads(scores, metric=given.metric, margin=given.margin)


def _deciding_run(
    given: CompareSettings,
    plan: Plan,
    inputs: Inputs,
    methods: Mapping[str, Method],
    found: Recommendation,
    spreads: Spreads,
) -> DecidingRun | None:
    """The cheapest comparison that decides what ``found`` leaves open, or else one of twice the steps, which may; None
    if nothing is open.
    """
    if found["decided"]:
        return None
    names = [name for name in given.methods if name in (found["best"], *found["open"])]
    grids = {name: [item["learning_rate"] for item in state_of(plan, name).search["tried"]] for name in names}
    rates = wider_rates(methods, names, grids)
    # The grids of the methods may differ, and one option holds them all.
    every_rate = tuple(dict.fromkeys([*(rate for name in names for rate in grids[name]), *rates]))
    # With --budget, other rates are a different search, and so a different comparison.
    anew = bool(rates and given.budget)
    tried = len(every_rate) if given.budget is None else 1
    done = min(methods[name]["seeds"] for name in names) if given.time else given.seeds
    choice = spreads.deciding(done, len(names), tried, anew=anew)
    runs, factor, seeds = choice or (planned_runs(len(names), tried, given.seeds), 1, given.seeds)
    rows, is_longer = inputs.eval_rows * factor, choice is None
    changes: JsonObject = {"methods": tuple(names)}
    if is_longer:
        changes |= {"max_steps": 2 * given.max_steps} if given.max_steps else {"epochs": 2 * given.epochs}
    elif rates or given.learning_rates:
        changes["learning_rates"] = every_rate
    if factor > 1:
        changes |= {"eval_limit": rows} if given.eval_limit else {"eval_data": "MORE-ROWS"}
    if factor > 1 or anew or is_longer:
        changes["output"] = given.output.with_name(f"{given.output.name}-2")
    else:
        # A method that is not tuned may take a new rate, on all seeds.
        again = sum(methods[name]["learning_rate_at_edge"] for name in names) * (given.seeds - 1) if rates else 0
        runs += len(names) * len(rates) + again
    if given.time is None:
        changes["seeds"] = seeds
    else:
        each = (1 + is_longer) * max(item["wall_seconds"] or 0.0 for item in methods.values())
        changes["time"] = f"{math.ceil(runs * each / 60) or 1}m"
    return {
        "methods": names,
        "seeds": seeds,
        "rows": rows,
        "learning_rates": [] if is_longer else rates,
        "is_longer": is_longer,
        "runs": runs,
        "command": command_line(given.model_copy(update=changes)),
    }


def _warn_of_shared_steps(plan: Plan) -> None:
    """Warn (RW589) if the base's measurement or its preparation failed, and name what the report lacks."""
    for job, lacks in ((Job("measure", None), "figures of the base model"), (Job("prepare", None), "a prepared base")):
        outcome = stages.outcome_of(job, plan.output)
        if outcome is not None and outcome.error is not None:
            warn("RW589", f"the comparison lacks {lacks}: {outcome.error['code']}: {outcome.error['message']}")


def command_line(given: CompareSettings) -> str:
    """The command that repeats this comparison."""
    words = ["rankwise", "compare"]
    options = given.model_dump(mode="json")
    # Some defaults depend on other options.
    defaults = given.defaults(options)
    for name, value in options.items():
        if value == defaults.get(name) or name in ("retry", "jobs", "executor", "address"):
            continue
        several = name in ("task", "task_data")
        for item in value if several else [value]:
            words += option_words(name, item)
    return shlex.join(words)


LEFT_OUT = ("checkpoints", "evaluation", "runs")
NOT_SETTINGS = {"output", "cache", "resume", "overwrite"}


def best_run(finished: Sequence[Run], method: str, metric: str, *, higher_is_better: bool) -> Run:
    """The final run of the method with the best value."""
    scored = [(value_of(run, metric), run) for run in finished if run["method"] == method]
    known = [(value, run) for value, run in scored if value is not None]
    return (max if higher_is_better else min)(known, key=lambda item: item[0])[1]


def hand_over(output: Path, found: Recommendation, run: Run) -> Recommendation:
    """Write ``recommended.yaml`` and ``best``, and return the recommendation with their paths."""
    write_text(output / RECOMMENDED_FILE, recommended_yaml(output, run["settings"]))
    with whole_folder(output / BEST_FOLDER, replace=True) as folder:
        left_out = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(output / run["folder"], folder, ignore=left_out, dirs_exist_ok=True)
    return {
        **found,
        "config": RECOMMENDED_FILE,
        "command": shlex.join(["rankwise", "train", "--config", str(output / RECOMMENDED_FILE)]),
        "run": run["id"],
        "adapter": BEST_FOLDER,
    }


def recommended_yaml(output: Path, settings: Fields) -> str:
    """The run's settings, without those at their defaults, and with an output folder of its own."""
    import yaml

    defaults = TrainSettings.defaults()
    kept = {
        name.replace("_", "-"): settings[name]
        for name in ("model", "data", *defaults)
        if name in settings and name not in NOT_SETTINGS and settings[name] != defaults.get(name)
    }
    kept["method"] = settings["method"]
    kept["output"] = str(output.resolve() / "recommended")
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)
