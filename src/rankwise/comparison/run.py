"""``compare``: from settings to a folder with every run, their statistics and one recommendation."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial

from rankwise.comparison import finish, stages
from rankwise.comparison.collect import collect_runs, metrics_of, read_tasks, value_of
from rankwise.comparison.commands import Commands
from rankwise.comparison.detectable import Spreads, wider_rates
from rankwise.comparison.folder import SETTINGS_FILE, check_folder, check_same
from rankwise.comparison.inputs import Inputs, check_model, prepare_inputs
from rankwise.comparison.matrix import planned_runs
from rankwise.comparison.pool import (
    STATE_FILE,
    Clock,
    Cluster,
    Pool,
    Watcher,
    check_system,
    connect,
    environments,
    forget_unfinished,
)
from rankwise.comparison.schedule import Plan, jobs_left, jobs_to_do, possible_jobs, probe_of, state_of
from rankwise.comparison.settings import CompareSettings, check_compare, has_one_rate, shared_training
from rankwise.comparison.stages import PERPLEXITY, Job
from rankwise.comparison.statistics import CONFIDENCE
from rankwise.comparison.summary import all_methods, conclusions, scores_by_metric
from rankwise.comparison.tasks import make_tasks, own_task
from rankwise.comparison.verdicts import Scores
from rankwise.config import ADAPTERS, FOUR_BITS, TrainSettings, idle_options, variant_of
from rankwise.conflicts import check_conflicts
from rankwise.default_rate import default_rate
from rankwise.disk import coded_errors, discard_folder, hold, remove_strays
from rankwise.errors import ConfigError, InputError, RankwiseWarning, RunError, heard, warn
from rankwise.foreign import JsonObject
from rankwise.models.describe import model_hash
from rankwise.models.source import fetch_model
from rankwise.options import flag, option_words
from rankwise.planning.facts import read_model
from rankwise.records import write_json
from rankwise.reports.merging import unlike_hardware
from rankwise.reports.numbers import plural, rate
from rankwise.reports.schema import (
    BEST_FOLDER,
    COMPARISON_FILE,
    EVAL_LOSS,
    MERGED_FOLDER,
    RECOMMENDED_FILE,
    SCHEMA,
    Comparison,
    DecidingRun,
    Message,
    Method,
    MinimumDetectableEffect,
    Recommendation,
    Run,
)
from rankwise.reports.words import smallest_found

# Extensions of a job's files in ``DIR/cells`` that are written whole.
ENDINGS = (".in", ".json", ".yaml")


def compare(given: CompareSettings, watcher: Watcher) -> Comparison:
    """Run what is missing in ``given.output``, then write ``comparison.json`` and the recommended settings and adapter.

    Raises ConfigError (RW165 to RW168, RW182, RW626, and those of the runs' objective); RunError: RW580 a folder of
    other settings, RW581 a folder of something else, RW551 a file that cannot be written, RW582 a folder in use, RW584
    no run finished, RW589 a metric that was not measured, RW599 a system that is not POSIX; Interrupted (RW587).
    """
    check_compare(given)
    _check_settings(given)
    check_system()
    cluster = connect(given.address, given.device) if given.executor == "ray" else None
    told: list[Message] = []
    with hold(given.output), coded_errors(given.output, "and the same command continues"), _told(told):
        check_folder(given.output)
        is_new = not given.output.exists()
        given.output.mkdir(parents=True, exist_ok=True)
        remove_strays(given.output, (SETTINGS_FILE, STATE_FILE, COMPARISON_FILE, RECOMMENDED_FILE))
        clock = Clock(given.output)
        try:
            check_model(given)
            inputs = prepare_inputs(given, lambda described: check_same(given.output, given, described))
            inputs = _with_tasks(given, inputs)
            rates = _rates(given)
        except InputError:
            if is_new:
                shutil.rmtree(given.output)
            raise
        plan = _plan(given, rates)
        runs = collect_runs(plan)
        _check_base(given, plan, runs)
        before = scores_by_metric(plan.output, plan.methods, runs).get(given.metric, {})
        effect = _spreads(given, before, inputs).effect(given.seeds, len(given.methods) - 1)
        _announce(given, plan, inputs, effect, watcher)
        try:
            _carry_out(given, plan, inputs, watcher, clock, cluster)
            return _conclude(given, plan, inputs, told, watcher, clock)
        finally:
            with suppress(OSError):
                # The first error is the one to raise.
                clock.keep(now=True)


def _announce(
    given: CompareSettings, plan: Plan, inputs: Inputs, effect: MinimumDetectableEffect, watcher: Watcher
) -> None:
    each = len(plan.rates[plan.methods[0]])
    runs = planned_runs(len(plan.methods), 1 if plan.halved else each, given.seeds, short=plan.short)
    methods, rates = plural(len(plan.methods), "method"), plural(each, "learning rate")
    halved = "" if given.budget is None else f" in short runs of {given.budget:g} times a run's steps"
    seeds = plural(given.seeds, "seed")
    watcher.say(f"{plural(runs, 'run')}: {methods}, {rates} on seed 0{halved}, {seeds} at each method's best.")
    if given.learning_rates is None:
        grids = "; ".join(f"{method} {', '.join(map(rate, grid))}" for method, grid in plan.rates.items())
        watcher.say(f"Learning rates around the defaults for this model (--learning-rates to change): {grids}.")
    watcher.say(f"{inputs.train_rows:,} rows to train on, {inputs.eval_rows:,} to evaluate on.")
    _warn_of_idle_options(given)
    if given.seeds < 2:
        warn("RW585", "one seed gives no intervals and no verdicts; give --seeds 3 or more.")
        return
    if effect["relative"] is None and effect["absolute"] is None:
        warn("RW585", f"one evaluation row gives no verdicts on {given.metric}; give more --eval-data.")
        return
    watcher.say(smallest_found(effect))


def _warn_of_idle_options(given: CompareSettings) -> None:
    """Warn (RW529) of options without effect, here or on any of the methods. A run omits those without effect on its
    method.
    """
    methods = [variant_of(name)[0] for name in given.methods]
    without = [{name for names in idle_options(method).values() for name in names} for method in methods]
    common, defaults = set.intersection(*without), given.defaults()
    idle = [flag(name) for name in defaults if name in common and getattr(given, name) != defaults[name]]
    if idle:
        warn(
            "RW529",
            f"{', '.join(idle)}: no effect with --methods {','.join(given.methods)}; none of these methods uses it.",
        )
    if given.search_steps is not None and has_one_rate(given):
        warn("RW529", "--search-steps: no effect with one rate, which is not searched for; give more --learning-rates.")
    if given.task_limit is not None and not given.task:
        warn("RW529", "--task-limit: no effect without --task.")


def _spreads(given: CompareSettings, scores: Mapping[str, Scores], inputs: Inputs) -> Spreads:
    # For preferences, the loss is only known as a mean.
    by_row = given.row_sd if (given.objective, given.metric) == ("sft", EVAL_LOSS) else 0.0
    return Spreads(
        scores,
        metric=given.metric,
        margin=given.margin,
        rows=inputs.eval_rows,
        seed_sd=given.seed_sd,
        row_sd=by_row,
    )


def _check_settings(given: CompareSettings) -> None:
    """Raise what each run would raise for its settings, before any run starts."""
    inputs = {"model": given.model, "data": given.data, "eval_data": given.data, "output": given.output}
    common = {**shared_training(given), **inputs}
    for method, options in map(variant_of, given.methods):
        settings = TrainSettings.model_validate({**common, **options, "method": method})
        check_conflicts(settings, processes=1)


def _with_tasks(given: CompareSettings, inputs: Inputs) -> Inputs:
    """The inputs with the hashes of the tasks' questions. Checks the tasks before hours of training: unknown tasks,
    missing data or packages, unknown metrics.
    """
    asked = make_tasks(given.task, data=given.task_data, limit=given.task_limit)
    tasks = [own_task(inputs.evaluation, shared_training(given)), *asked]
    name, _, metric = given.metric.partition(".")
    known = next((list(task.higher_is_better) for task in tasks if task.name == name and name != PERPLEXITY), None)
    if name == PERPLEXITY or (known and metric not in known):
        choice = ", ".join([EVAL_LOSS, *(f"{name}.{item}" for item in known or ())])
        raise ConfigError("RW167", f"--metric is {given.metric!r}, which is not measured; there are {choice}.")
    return dataclasses.replace(inputs, questions={task.name: task.data_sha256 for task in asked})


def _check_base(given: CompareSettings, plan: Plan, runs: Sequence[Run]) -> None:
    """Raise RunError (RW580) where the base model's content differs from that of the finished runs."""
    before = {run["record"]["base_model"].get("sha256") for run in runs if run["record"] is not None} - {None}
    if not before or not jobs_left(plan):
        return
    source = fetch_model(given.model, revision=given.revision, trust_remote_code=given.trust_remote_code)
    if before != {model_hash(source)}:
        raise RunError(
            "RW580",
            f"the runs in {given.output} trained --model {given.model} with other weights; give the same model, or "
            "another --output.",
        )


def _rates(given: CompareSettings) -> dict[str, tuple[float, ...]]:
    """{method: the rates that it tries}: the given ones, or three around its default."""
    if given.learning_rates is not None:
        return dict.fromkeys(given.methods, given.learning_rates)
    options: JsonObject = {"revision": given.revision, "trust_remote_code": given.trust_remote_code}
    model = read_model(fetch_model(given.model, **options, weights=False))
    shared, known = shared_training(given), {name: variant_of(name) for name in given.methods}
    return {
        name: default_rate(model.family, model.facts.width, {**shared, **changes, "method": method}).around
        for name, (method, changes) in known.items()
    }


def _plan(given: CompareSettings, rates: Mapping[str, tuple[float, ...]]) -> Plan:
    return Plan(
        given.output,
        tuple(given.methods),
        rates,
        given.seeds,
        given.search_steps is not None,
        # Rewards are relative to the base, so the base has none.
        base=given.objective == "sft" or bool(given.task),
        tasks=given.task,
        probed=given.minutes is not None,
        halved=given.budget is not None,
    )


def _carry_out(
    given: CompareSettings, plan: Plan, inputs: Inputs, watcher: Watcher, clock: Clock, cluster: Cluster | None
) -> None:
    """Run the steps that all runs share, then the speed runs of --minutes, then the runs."""
    commands = Commands(given, plan, inputs)
    first = [Job("prepare", None)]
    probes = [probe_of(plan, method) for method in plan.methods] if given.minutes else []
    known = [*first, *probes, *possible_jobs(plan)]
    names = [job.name(plan.output).name + ending for job in (*known, *jobs_left(plan)) for ending in ENDINGS]
    remove_strays(plan.output / "cells", names)
    forget_unfinished(plan.output, known, retry=given.retry)
    for job in known:
        if commands.is_outdated(job):
            stages.forget_outcome(job, plan.output)
    slots = [{}] * (given.jobs or cluster.places) if cluster else environments(given.jobs or 1, given.device)
    start = cluster.start if cluster else None
    clock.lanes = len(slots)
    pool = Pool(plan.output, commands.of, commands.steps, slots, watcher, clock, lambda: jobs_left(plan), start)
    for group in (first, probes):
        pool.carry_out(partial(_open_jobs, group, plan))
    pool.carry_out(lambda: jobs_to_do(plan))


def _open_jobs(jobs: Sequence[Job], plan: Plan) -> list[Job]:
    return [job for job in jobs if stages.outcome_of(job, plan.output) is None]


def _conclude(
    given: CompareSettings,
    plan: Plan,
    inputs: Inputs,
    told: list[Message],
    watcher: Watcher,
    clock: Clock,
) -> Comparison:
    runs = collect_runs(plan)
    final = [run for run in runs if run["phase"] == "final"]
    finished = [run for run in final if run["status"] == "finished"]
    if not finished:
        errors = [run["error"] for run in final or runs if run["error"] is not None]
        reason = f"{errors[0]['code']}: {errors[0]['message']}" if errors else "nothing was started."
        at = " at the rate that its search chose" if any(run["status"] == "finished" for run in runs) else ""
        raise RunError("RW584", f"no run finished{at}: {reason}")
    better = metrics_of(runs)
    scores = scores_by_metric(plan.output, plan.methods, runs)
    if not scores.get(given.metric):
        known = ", ".join(metric for metric, found in scores.items() if found) or "no figures at all"
        raise RunError("RW589", f"no run has a finite value of --metric {given.metric}; there are {known}.")
    methods = all_methods(plan, runs, scores)
    _warn_of_edges_and_failures(runs, methods)
    _warn_of_missing_values(finished, given.metric)
    _warn_of_unlike_runs(finished)
    _warn_of_shared_steps(plan)
    spreads = _spreads(given, scores[given.metric], inputs)
    found = conclusions(methods, scores, better, spreads, memory_bytes=given.memory, hours=given.max_hours)
    recommendation = _with_files(given, runs, found["recommendation"], watcher, higher_is_better=better[given.metric])
    recommendation["deciding"] = _deciding_run(given, plan, methods, recommendation, spreads)
    first = finished[0]["record"] or {}
    base = plan.output / stages.BASE
    comparison: Comparison = {
        "schema": SCHEMA,
        "command": command_line(given),
        "settings": given.model_dump(mode="json"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": first.get("versions", {}),
        "device": first.get("device", {}),
        "model": first.get("base_model", {}),
        "data": inputs.described,
        "primary_metric": given.metric,
        "confidence": CONFIDENCE,
        "base": {"tasks": read_tasks(base, plan.tasks), "folder": stages.BASE if base.is_dir() else None},
        "warnings": list({(item["code"], item["message"]): item for item in told}.values()),
        "runs": runs,
        **found,
        "recommendation": recommendation,
        "learning_rates": {method: state_of(plan, method).search for method in plan.methods},
        "seconds": clock.spent(),
    }
    write_json(given.output / COMPARISON_FILE, comparison)
    return comparison


def _with_files(
    given: CompareSettings, runs: list[Run], found: Recommendation, watcher: Watcher, *, higher_is_better: bool
) -> Recommendation:
    """The recommendation, with the files of its best run in the folder."""
    method = found["method"]
    best = method and finish.best_run(runs, method, given.metric, higher_is_better=higher_is_better)
    finish.forget_other_results(given.output, best["id"] if best else None)
    if best:
        found = finish.hand_over(given.output, found, best)
        if given.merge:
            found["merged"] = _merge(given, best, watcher)
    return found


def _deciding_run(
    given: CompareSettings, plan: Plan, methods: Mapping[str, Method], found: Recommendation, spreads: Spreads
) -> DecidingRun | None:
    """The cheapest comparison that decides what ``found`` leaves open; None if nothing is open or no run decides it."""
    if found["decided"] or found["best"] is None:
        return None
    names = [name for name in given.methods if name in (found["best"], *found["open"])]
    rates = wider_rates(methods, names, plan.rates)
    # The default grids of the methods may differ, and one option holds them all.
    every_rate = tuple(dict.fromkeys([*(rate for name in names for rate in plan.rates[name]), *rates]))
    # With --budget, other rates are another search, and so another comparison.
    anew, short = bool(rates and given.budget), given.search_steps is not None
    tried = len(every_rate) if given.budget is None else 1
    choice = spreads.deciding(given.seeds, len(names), tried, short=short, anew=anew)
    if choice is None:
        return None
    runs, factor, seeds = choice
    changes: JsonObject = {"methods": tuple(names), "seeds": seeds}
    if rates or given.learning_rates:
        changes["learning_rates"] = every_rate
    rows = spreads.rows * factor
    if factor > 1:
        changes |= {"eval_limit": rows} if given.eval_limit else {"eval_data": "MORE-ROWS"}
    if factor > 1 or anew:
        changes["output"] = given.output.with_name(f"{given.output.name}-2")
    else:
        # A method that is not tuned may take a new rate, on all seeds.
        again = sum(methods[name]["learning_rate_at_edge"] for name in names) * (given.seeds - 1) if rates else 0
        runs += len(names) * len(rates) + again
    command = command_line(given.model_copy(update=changes))
    return {
        "methods": names,
        "seeds": seeds,
        "rows": rows,
        "learning_rates": rates,
        "runs": runs,
        "command": command,
    }


def _warn_of_edges_and_failures(runs: list[Run], methods: Mapping[str, Method]) -> None:
    edges = [name for name, item in methods.items() if item["learning_rate_at_edge"]]
    if edges:
        warn(
            "RW586",
            f"the best learning rate of {', '.join(edges)} lies at the edge of those tried; its true optimum may lie "
            "beyond, so add a rate there with --learning-rates.",
        )
    for name, item in methods.items():
        if item["skipped"]:
            warn("RW588", f"{name} was left out: {item['skipped']}")
    for run in runs:
        if run["status"] == "failed" and run["error"]:
            warn("RW588", f"{run['id']} failed: {run['error']['code']}: {run['error']['message']}")
        elif run["status"] == "interrupted":
            warn("RW597", f"{run['id']} was interrupted, so it has no figures; the same command continues it.")
        merged = run["merged"]
        if merged and merged["is_more_than_rounding"]:
            warn(
                "RW589",
                f"{run['id']}: merging changed a logit by {merged['max_logit_difference']:.3g}, and rounding alone by "
                f"{merged['rounding_logit_difference']:.3g}: the merged model is not equivalent.",
            )
        if run["status"] == "finished" and run["error"]:
            warn("RW589", f"{run['id']} trained, but: {run['error']['code']}: {run['error']['message']}")


def _warn_of_missing_values(finished: Sequence[Run], metric: str) -> None:
    """Warn (RW589) of runs that count as seeds and have no finite value. A failed measurement has its own warning."""
    for run in finished:
        if run["error"] is None and value_of(run, metric) is None:
            warn("RW589", f"{run['id']} trained, but has no finite {metric}, so it does not count in its mean.")


def _warn_of_unlike_runs(finished: Sequence[Run]) -> None:
    """Warn of runs on different hardware (RW595), and of runs that read different data (RW591): a file may change while
    the runs go on.
    """
    if (message := unlike_hardware(finished)) is not None:
        warn("RW595", message)
    for part in ("train", "eval"):
        found = {run["id"]: ((run["record"] or {}).get("data", {}).get(part) or {}).get("sha256") for run in finished}
        read = {name: sha256 for name, sha256 in found.items() if sha256 is not None}
        if len({*read.values()}) > 1:
            first, *rest = read
            others = ", ".join(name for name in rest if read[name] != read[first])
            what = {"train": "training", "eval": "evaluation"}[part]
            warn(
                "RW591",
                f"the {what} data changed between the runs: {others} read another version than {first}; compare again "
                "in another --output.",
            )


def _warn_of_shared_steps(plan: Plan) -> None:
    """Warn (RW589) where the base's measurement or its preparation failed, and name what the report lacks."""
    for job, lacks in ((Job("measure", None), "figures of the base model"), (Job("prepare", None), "a prepared base")):
        outcome = stages.outcome_of(job, plan.output)
        if outcome is not None and outcome.error is not None:
            warn("RW589", f"the comparison lacks {lacks}: {outcome.error['code']}: {outcome.error['message']}")


def _merge(given: CompareSettings, run: Run, watcher: Watcher) -> str | None:
    """Merge the best run into an ordinary model in ``DIR/merged``. A 4-bit run merges onto its dequantized base."""
    import subprocess
    import sys

    method = variant_of(run["method"])[0]
    if method not in ADAPTERS:
        warn("RW589", f"--merge: the result of {run['method']} is not an adapter that can be merged.")
        return None
    output = given.output
    discard_folder(output / MERGED_FOLDER)
    watcher.say("Merging the recommended adapter.")
    command = ["merge", "--adapter", str(output / BEST_FOLDER), "--output", str(output / MERGED_FOLDER)]
    # A PiSSA adapter belongs on the original weights.
    is_pissa = str((run["record"] or {})["settings"].get("init")).startswith("pissa")
    command += ["--onto", "quantized"] if method in FOUR_BITS and not is_pissa else []
    command += ["--trust-remote-code"] if given.trust_remote_code else []
    done = subprocess.run([sys.executable, "-m", stages.CLI, *command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        warn("RW589", f"--merge failed: {done.stderr.strip()[-500:]}")
        return None
    return MERGED_FOLDER


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
        in_bytes = name in ("memory", "memory_budget")
        for item in value if several else [f"{value}B" if in_bytes else value]:
            words += option_words(name, item)
    return shlex.join(words)


def _told(told: list[Message]) -> AbstractContextManager[None]:
    """A context that shows warnings as usual and appends each RankwiseWarning to ``told``, for the report."""

    def tell(warning: RankwiseWarning) -> bool:
        told.append({"code": warning.code, "message": warning.message})
        return True

    return heard(tell)
