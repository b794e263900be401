"""``compare``: from settings to a folder with every run, their statistics and one recommendation."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rankwise.comparison import stages
from rankwise.comparison.conclusion import conclude, spreads_of
from rankwise.comparison.inputs import (
    SETTINGS_FILE,
    Inputs,
    check_folder,
    check_model,
    check_same,
    make_tasks,
    own_task,
    prepare_inputs,
)
from rankwise.comparison.pool import Cluster, Pool, Watcher, connect, environments, forget_unfinished
from rankwise.comparison.results import collect_runs, read_json, scores_by_metric
from rankwise.comparison.rounds import LOOKS_FILE, Rounds, noted_calls
from rankwise.comparison.settings import OF_NUMBERS, CompareSettings, check_compare, seconds_of, shared_training
from rankwise.comparison.stages import (
    PERPLEXITY,
    Cell,
    Job,
    Plan,
    cell_settings,
    jobs_left,
    planned_runs,
    possible_jobs,
)
from rankwise.comparison.statistics import LOOKS
from rankwise.config import TrainSettings, idle_options, variant_of
from rankwise.conflicts import check_conflicts
from rankwise.default_rate import default_rate
from rankwise.disk import coded_errors, hold, remove_strays
from rankwise.errors import ConfigError, DataError, InputError, RankwiseWarning, RunError, heard, warn
from rankwise.foreign import JsonObject
from rankwise.labels import NUMBER
from rankwise.models.source import fetch_model, model_hash
from rankwise.objectives import OBJECTIVES
from rankwise.options import flag
from rankwise.planning.extend import Traces
from rankwise.planning.facts import read_model
from rankwise.planning.hardware import cpu_hardware, import_seconds, this_machine
from rankwise.planning.speed import pace_of, step_seconds
from rankwise.planning.workload import planned_methods, workload_of
from rankwise.records import write_json
from rankwise.reports.comparison import EVAL_LOSS, RECOMMENDED_FILE, REPORT_FILE, RETAINED, Comparison, Message, Run
from rankwise.reports.numbers import duration, plural, rate
from rankwise.reports.words import smallest_found

# Extensions of a job's files in ``DIR/cells`` that are written whole.
ENDINGS = (".in", ".json", ".yaml")
# Of English in usual tokenizers, roughly.
CHARACTERS_A_TOKEN = 4


def compare(given: CompareSettings, watcher: Watcher) -> Comparison:
    """Run what is missing in ``given.output``, then write ``report.json`` and the recommended settings and adapter.

    Raises ConfigError (RW165 to RW168, RW182, RW626, and those of the runs' objective); RunError: RW580 a folder of
    other settings, RW581 a folder of something else, RW551 a file that cannot be written, RW582 a folder in use, RW584
    no run finished, RW589 a metric that was not measured; Interrupted (RW587).
    """
    check_compare(given)
    _check_settings(given)
    cluster = connect(given.address, given.device) if given.executor == "ray" else None
    told: list[Message] = []
    with hold(given.output), coded_errors(given.output, "and the same command continues"), _told(told):
        check_folder(given.output)
        is_new = not given.output.exists()
        given.output.mkdir(parents=True, exist_ok=True)
        remove_strays(given.output, (SETTINGS_FILE, LOOKS_FILE, REPORT_FILE, RECOMMENDED_FILE))
        try:
            check_model(given)
            inputs = prepare_inputs(given, lambda described: check_same(given.output, given, described))
            # Numbers and names share no metric.
            is_number = inputs.labels is not None and inputs.labels.problem == NUMBER
            if is_number and "metric" not in given.model_fields_set:
                given = given.model_copy(update={"metric": OF_NUMBERS})
            inputs = _with_tasks(given, inputs)
            rates = _rates(given)
        except InputError:
            if is_new:
                shutil.rmtree(given.output)
            raise
        rounds = Rounds(given, _plan(given, rates))
        _check_base(given, rounds.plan, collect_runs(rounds.plan))
        _announce(given, rounds.plan, inputs, watcher)
        try:
            _carry_out(given, rounds, inputs, watcher, cluster)
        except DataError:
            # No run can start, so the folder holds nothing; with other settings it would be refused.
            if is_new:
                shutil.rmtree(given.output)
            raise
        return conclude(given, rounds.plan, inputs, told)


def _announce(given: CompareSettings, plan: Plan, inputs: Inputs, watcher: Watcher) -> None:
    each, methods = len(plan.rates[plan.methods[0]]), plural(len(plan.methods), "method")
    rates, seeds = plural(each, "learning rate"), plural(given.seeds, "seed")
    halved = "" if given.budget is None else f" in short runs of {given.budget:g} times a run's steps"
    if given.time is None:
        runs = planned_runs(len(plan.methods), 1 if plan.halved else each, given.seeds)
        watcher.say(f"{plural(runs, 'run')}: {methods}, {rates} on seed 0{halved}, {seeds} at each method's best.")
    else:
        watcher.say(
            f"{methods} in {given.time}: {rates} each{halved}, {seeds}, then further seeds for those that may still be "
            f"best. A first standing after {2 * len(plan.methods)} runs, verdicts from {plural(LOOKS[0], 'seed')} on."
        )
    if given.learning_rates is None:
        grids = "; ".join(f"{method} {', '.join(map(rate, grid))}" for method, grid in plan.rates.items())
        watcher.say(f"Learning rates around the defaults for this model (--learning-rates to change): {grids}.")
        watcher.say("If a method's best rate lies at the edge, one more is tried on that side, in a whole run.")
    watcher.say(f"{inputs.train_rows:,} rows to train on, {inputs.eval_rows:,} to evaluate on.")
    if jobs_left(plan):
        watcher.say(_time_words(given, plan, inputs))
    _warn_of_idle_options(given)
    if given.seeds < 2:
        warn("RW585", "one seed gives no intervals and no verdicts; give --seeds 3 or more.")
        return
    # Of preferences, the loss is only known as a mean.
    if inputs.eval_rows < 2 and given.metric == EVAL_LOSS and OBJECTIVES[given.objective].of_demonstrations:
        warn("RW585", f"one evaluation row gives no verdicts on {given.metric}; give more --eval-data.")
        return
    before = scores_by_metric(plan.output, plan.methods, collect_runs(plan), plan.looks).get(given.metric, {})
    effect = spreads_of(given, before).effect(given.seeds, len(given.methods) - 1)
    if effect["relative"] is not None:
        watcher.say(smallest_found(effect))
    else:
        watcher.say("How small a difference it finds follows from the runs; no promise is made before two seeds ended.")


# What a run takes beside steps and evaluations in its two processes, for training and for measuring, as a multiple of
# the imports of one: both load the model and write answers. Of demo on a Xeon without AMX.
BESIDE_IMPORTS = 5.5
# The least of several moments: others' bursts pass, but who keeps a processor busy is seen in all.
PROBE_SECONDS, PROBES = 0.3, 3


def waiting() -> float:
    """Elapsed time by processor time of a moment's work: above 1 where other programs take the processor."""
    return max(1.0, min(_waited() for _ in range(PROBES)))


def _waited() -> float:
    began, spent = time.perf_counter(), time.process_time()
    while (worked := time.process_time() - spent) < PROBE_SECONDS:
        sum(range(10_000))
    return (time.perf_counter() - began) / worked


def _time_words(given: CompareSettings, plan: Plan, inputs: Inputs) -> str:
    """The time of all runs on this machine, by the memory plan's estimate of a step."""
    from rankwise.training.learning import ROW_COST, evaluation_steps_of
    from rankwise.training.products import affordable_rows

    shared, hardware = shared_training(given), cpu_hardware() if given.device == "cpu" else this_machine()
    tokens = max(2, min(given.max_length, inputs.row_characters // CHARACTERS_A_TOKEN))
    rows = given.batch_size * given.gradient_accumulation
    steps = given.max_steps or math.ceil(inputs.train_rows * given.epochs / rows)
    code, seconds, count, beside = given.trust_remote_code, 0.0, 0.0, BESIDE_IMPORTS * import_seconds()
    source = fetch_model(given.model, revision=given.revision, trust_remote_code=code, weights=False)
    try:
        model = read_model(source, trust_remote_code=code)
        ask = Traces(model)
        for name in plan.methods:
            method, changes = variant_of(name)
            step = workload_of({**shared, **changes, "max_length": tokens}, hardware)
            if not affordable_rows(given.batch_size, tokens, steps * given.gradient_accumulation):
                # Where 8 bits are not measured, `auto` does not take them.
                step = dataclasses.replace(step, products="bfloat16" if step.products == "auto" else step.products)
            pace = pace_of(hardware, step.dtype)
            if method not in planned_methods() or pace is None:
                return f"No speed is known of {method} on {hardware.name}; the time left is told after the first run."
            each = step_seconds(ask(method, step), model.facts, step, pace, given.gradient_accumulation)
            evaluation = ROW_COST * each * inputs.eval_rows / rows
            # One more before the first step, and one of the measurement.
            evaluations = math.ceil(steps / evaluation_steps_of(steps, rows, inputs.eval_rows)) + 2
            a_run = steps * each + evaluations * evaluation
            runs = given.seeds if given.budget else planned_runs(1, len(plan.rates[name]), given.seeds)
            # Short runs, within a method's first, take so many times a run's steps, and evaluate once each.
            searching = given.budget * steps * each + len(plan.rates[name]) * evaluation if given.budget else 0.0
            seconds, count = seconds + searching + runs * (a_run + beside), count + runs
    except InputError as error:
        return f"The time cannot be estimated: {error.message}"
    if hardware.device_type == "cpu":
        seconds *= waiting()
    # Runs side by side share a processor.
    places = (given.jobs or 1) if hardware.device_type == "cuda" else 1
    mean, basis = (
        duration(seconds / count),
        f"{steps} steps of {rows} rows, about {tokens} tokens a row, as busy as it is now",
    )
    if given.time is not None:
        fitting = int(seconds_of(given.time) * places * count / seconds)
        return f"By the plan a run takes about {mean} ({basis}), so {given.time} holds about {plural(fitting, 'run')}."
    return f"About {duration(seconds / places)}, {mean} a run, by the plan with evaluations: {basis}."


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
    if given.task_limit is not None and not given.task:
        warn("RW529", "--task-limit: no effect without --task.")


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
    tasks = [own_task(inputs.evaluation, shared_training(given), inputs.labels), *asked]
    name, _, metric = given.metric.partition(".")
    known = next((list(task.higher_is_better) for task in tasks if task.name == name and name != PERPLEXITY), None)
    if name == PERPLEXITY or (known and metric not in known):
        choice = ", ".join([EVAL_LOSS, *(f"{name}.{item}" for item in known or ())])
        raise ConfigError("RW167", f"--metric is {given.metric!r}, which is not measured; there are {choice}.")
    return dataclasses.replace(inputs, questions=inputs.questions | {task.name: task.data_sha256 for task in asked})


def _check_base(given: CompareSettings, plan: Plan, runs: Sequence[Run]) -> None:
    """Raise RunError (RW580) if the base model's content differs from that of the finished runs."""
    before = {run["base_model"].get("sha256") for run in runs if "base_model" in run} - {None}
    if not before or not jobs_left(plan):
        return
    source = fetch_model(given.model, revision=given.revision, trust_remote_code=given.trust_remote_code)
    if before != {model_hash(source)}:
        raise RunError(
            "RW580",
            f"the runs in {given.output} trained --model {given.model} with other weights; give the same model, or "
            "a different --output.",
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
        output=given.output,
        methods=tuple(given.methods),
        rates=rates,
        seeds=given.seeds,
        # Rewards are relative to the base, so the base has none.
        base=not OBJECTIVES[given.objective].of_preferences or bool(given.task or given.retain),
        tasks=(*given.task, *([RETAINED] if given.retain else [])),
        halved=given.budget is not None,
        extends=given.learning_rates is None,
        looks=noted_calls(given.output, given.methods) if given.time is not None else (),
    )


def _carry_out(
    given: CompareSettings, rounds: Rounds, inputs: Inputs, watcher: Watcher, cluster: Cluster | None
) -> None:
    """Prepare what all runs share, then do the runs."""
    plan = rounds.plan
    commands = Commands(given, plan, inputs)
    first = Job("prepare", None)
    known = [first, *possible_jobs(plan)]
    names = [job.name(plan.output).name + ending for job in (*known, *jobs_left(plan)) for ending in ENDINGS]
    remove_strays(plan.output / "cells", names)
    forget_unfinished(plan.output, known, retry=given.retry)
    for job in known:
        if commands.is_outdated(job):
            stages.forget_outcome(job, plan.output)
    slots = [{}] * (given.jobs or cluster.places) if cluster else environments(given.jobs or 1, given.device)
    start = cluster.start if cluster else None
    standing = rounds.told if given.time else None
    pool = Pool(
        output=plan.output,
        command=commands.of,
        environments=slots,
        watcher=watcher,
        left=lambda: jobs_left(rounds.plan),
        start=start,
        standing=standing,
    )
    pool.carry_out(lambda: [] if stages.outcome_of(first, plan.output) else [first])
    pool.carry_out(rounds.jobs)
    if given.time:
        watcher.say(rounds.ended())


def _told(told: list[Message]) -> AbstractContextManager[None]:
    """A context that shows warnings as usual and appends each RankwiseWarning to ``told``, for the report."""

    def tell(warning: RankwiseWarning) -> bool:
        told.append({"code": warning.code, "message": warning.message})
        return True

    return heard(tell)


# Settings, other than the tasks, on which the results of a measurement depend.
MEASURED = ("task_limit", "eval_data", "max_length", "chat_template", "dtype")


class Commands:
    """Makes the command of a job."""

    def __init__(self, given: CompareSettings, plan: Plan, inputs: Inputs) -> None:
        self.given, self.plan, self.inputs = given, plan, inputs
        self.shared = shared_training(given)

    def of(self, job: Job) -> tuple[str, list[str]]:
        if job.stage == "train":
            assert job.cell is not None
            return stages.CLI, stages.train_arguments(job, self.plan.output, self._cell_settings(job.cell))
        path = stages.beside(job.name(self.plan.output), ".in")
        if job.stage == "prepare":
            cells = [Cell(method, self.plan.rates[method][0], 0) for method in self.plan.methods]
            # The settings of one run of each method.
            write_json(path, {"runs": [self._cell_settings(cell) for cell in cells]})
        else:
            write_json(path, self._measuring(job))
        return stages.STEPS, [str(path)]

    def is_outdated(self, job: Job) -> bool:
        """Whether a finished step must run again because this call asks for other methods or tasks."""
        before = read_json(stages.beside(job.name(self.plan.output), ".in"))
        if job.stage == "prepare":
            return [run["method"] for run in before.get("runs", [])] != list(self.plan.methods)
        if job.stage != "measure" or not before:
            return False
        now = self._measuring(job)
        added = {*now["tasks"], now["retain"]} - {*before.get("tasks", ()), before.get("retain"), None}
        asked = before.get("questions", {})
        changed = any(asked.get(task, sha256) != sha256 for task, sha256 in now["questions"].items())
        return bool(added or changed) or any(before.get(name) != now[name] for name in MEASURED)

    def _cell_settings(self, cell: Cell) -> JsonObject:
        inputs = {"model": _model(self.given.model), "data": self.inputs.train, "eval_data": self.inputs.evaluation}
        shared = {**self.shared, "eval_limit": 0, "cache": str(self._cache())}
        settings = cell_settings(cell, self.plan.output, shared, inputs)
        if cell.learning_rate is not None:
            return settings
        rates = ",".join(map(repr, self.plan.rates[cell.method]))
        return settings | {"learning_rate": f"auto:{rates}", "budget": self.given.budget}

    def _cache(self) -> Path:
        """The cache folder with prepared base models."""
        return self.plan.output.resolve() / "cache"

    def _measuring(self, job: Job) -> JsonObject:
        names = (
            *("max_length", "eval_limit", "chat_template", "dtype", "device", "trust_remote_code", "revision"),
            *("objective", "beta", "prompt_column", "completion_column"),
        )
        return {
            "folder": str(job.folder(self.plan.output)),
            "model": _model(self.given.model),
            "cache": str(self._cache()),
            "method": variant_of(job.cell.method)[0] if job.cell else None,
            "eval_data": self.inputs.evaluation,
            "retain": self.inputs.retain,
            "tasks": list(self.given.task),
            "task_data": list(self.given.task_data),
            "labels": self.inputs.labels and self.inputs.labels.to_json(),
            "questions": self.inputs.questions,
            "task_limit": self.given.task_limit,
            **{name: self.shared[name] for name in names},
        }


def _model(name: str) -> str:
    """The model as the user wrote it, a path as an absolute one."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "demo" and path.exists() else name
