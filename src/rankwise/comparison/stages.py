"""The runs of a comparison, the stages of each, with the files from which a restart learns what is done, and what is to
be done next: searches first, then one seed after the other over all methods.
"""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from rankwise.config import idle_options, variant_of
from rankwise.errors import Interrupted, RunError, one_line
from rankwise.foreign import Fields, JsonObject, checked, read_json
from rankwise.records import RUN_FILE, RateTrial, RunRecord, read_metrics, record_of, write_json, write_text
from rankwise.reports.comparison import KEPT_ROWS_LOSS, RUNS_FOLDER, RateSearch, SearchedRate


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a method, with its variants, at a learning rate with a seed. A run without a rate first searches for its
    rate (``--learning-rate auto``).
    """

    method: str
    learning_rate: float | None
    seed: int

    @property
    def id(self) -> str:
        rate = "auto" if self.learning_rate is None else f"lr{self.learning_rate:g}"
        return f"{self.method}-{rate}-seed{self.seed}"

    def folder(self, output: Path) -> Path:
        return output / RUNS_FOLDER / self.id


def planned_runs(methods: int, rates: int, seeds: int) -> int:
    """The number of runs of the whole comparison."""
    return methods * (rates + seeds - 1)


def choose_rate(losses: Mapping[float, float | None]) -> tuple[float | None, bool]:
    """(rate with the lowest loss, whether it is the lowest or highest of those tried).

    A failed run (None, or a loss that is not finite) is never chosen but counts as tried: a best rate next to a
    diverged one is not at the edge.
    """
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        return None, False
    best = min(sorted(finite), key=lambda rate: finite[rate])
    return best, len(losses) > 1 and best in (min(losses), max(losses))


def cell_settings(cell: Cell, output: Path, shared: Fields, inputs: Fields) -> JsonObject:
    """The settings file of ``rankwise train`` for a cell. ``inputs``: model, data and eval_data.

    Options without effect on the cell's method are left out.
    """
    method, options = variant_of(cell.method)
    idle: set[str] = set().union(*idle_options(method).values())
    used = {name: value for name, value in shared.items() if name not in idle}
    of_cell = {"method": method, "learning_rate": cell.learning_rate, "seed": cell.seed}
    return {**used, **inputs, **options, **of_cell, "output": str(cell.folder(output))}


Stage = Literal["prepare", "train", "measure"]
CLI = "rankwise.__main__"
STEPS = "rankwise.comparison.steps"
# The tasks on the evaluation data: for demonstrations, preferences and labels.
PERPLEXITY, PREFERENCE, LABELS = OWN_TASKS = ("perplexity", "preference", "labels")
# In place of a cell's name in jobs that prepare the base or evaluate the unadapted model.
BASE = "base"
KILLED, INTERRUPTED = "RW583", "RW597"
# Error code of a run that does not fit according to the memory plan.
TOO_LARGE = "RW562"
# Errors that, before the first step, every seed of a method would raise.
OF_METHOD = ("ConfigError", "ModelError", "AdapterError", "QuantizationError")
# Error codes of a full or failed disk, which are no property of the run.
OF_DISK = ("RW513", "RW551")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage ended."""

    status: Literal["finished", "failed"]
    seconds: float
    error: dict[str, str] | None = None
    # Whether the stage was stopped from outside, so that the next call starts it again.
    again: bool = False
    # Whether training could not start: the method cannot run here, and its other seeds are skipped.
    cannot_run: bool = False
    # Whether training could not start because of the data, which all runs share.
    of_data: bool = False
    # Whether no other step could run beside it; not known after a kill.
    alone: bool = False

    @property
    def is_interrupted(self) -> bool:
        """Whether the stage was asked to stop, and is neither done nor failed."""
        return self.error is not None and self.error["code"] == INTERRUPTED


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage of a cell, or of the base model."""

    stage: Stage
    cell: Cell | None

    @property
    def id(self) -> str:
        return self.cell.id if self.cell else BASE

    def folder(self, output: Path) -> Path:
        return self.cell.folder(output) if self.cell else output / BASE

    def name(self, output: Path) -> Path:
        """The path of the job's files in ``DIR/cells``, without extension."""
        return output / "cells" / f"{self.id}.{self.stage}"


def outcome_of(job: Job, output: Path) -> Outcome | None:
    """How the job ended; None if it has not. A finished record counts even if a kill came before the outcome."""
    path = beside(job.name(output), ".json")
    try:
        return checked(Outcome, read_json(path))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise RunError(
            "RW581", f"cannot read {path}: {one_line(error)}; remove the file, so that the step runs again."
        ) from None
    record = record_of(job.folder(output)) if job.stage == "train" else None
    if record is not None and record.status == "finished":
        return Outcome(status="finished", seconds=record.wall_seconds or 0.0)
    return None


def keep_outcome(job: Job, output: Path, outcome: Outcome) -> None:
    write_json(beside(job.name(output), ".json"), dataclasses.asdict(outcome))


def forget_outcome(job: Job, output: Path) -> None:
    beside(job.name(output), ".json").unlink(missing_ok=True)


def beside(name: Path, ending: str) -> Path:
    """``NAME`` with an extension. Names contain dots, at which ``with_suffix`` would cut."""
    return name.with_name(name.name + ending)


def train_arguments(job: Job, output: Path, settings: Fields) -> list[str]:
    """The arguments of ``rankwise train`` for a cell; it resumes from its last checkpoint if there is one."""
    import yaml

    folder, config = job.folder(output), beside(job.name(output), ".yaml")
    there = (folder / RUN_FILE).is_file()
    config.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, yaml.safe_dump({key.replace("_", "-"): value for key, value in settings.items()}))
    return ["train", "--config", str(config), "--json", *(["--resume"] if there else [])]


def outcome_from(job: Job, output: Path, code: int, document: Fields, seconds: float) -> Outcome:
    """The outcome of a stage, from its exit code and the document that it printed."""
    if code == 0:
        return Outcome(status="finished", seconds=seconds)
    found = document.get("error")
    if -code in (signal.SIGINT, signal.SIGTERM) or code == Interrupted.exit_code:
        message = f"{job.stage} of {job.id} was interrupted before it ended; the same command continues it."
        return Outcome(status="failed", seconds=seconds, error={"code": INTERRUPTED, "message": message}, again=True)
    if code < 0 or not isinstance(found, Mapping):
        return Outcome(status="failed", seconds=seconds, error=_cut_off(job, output, code), again=code < 0)
    error = {"code": str(found.get("code")), "message": str(found.get("message"))}
    if error["code"] in OF_DISK:
        return Outcome(status="failed", seconds=seconds, error=error, again=True)
    stepped = job.stage == "measure" or any("loss" in line for line in read_metrics(job.folder(output)))
    is_of_method = job.stage == "train" and (found.get("kind") in OF_METHOD or error["code"] == TOO_LARGE)
    is_of_data = found.get("kind") == "DataError"
    return Outcome(
        status="failed",
        seconds=seconds,
        error=error,
        cannot_run=is_of_method and not stepped,
        of_data=is_of_data and not stepped,
    )


def _cut_off(job: Job, output: Path, code: int) -> dict[str, str]:
    log = beside(job.name(output), ".log")
    if code < 0:
        reason = f"a signal ({-code}) ended it" + (", as the system does when memory is full" if code == -9 else "")
    else:
        reason = f"it ended with code {code}"
    return {"code": KILLED, "message": f"{job.stage} of {job.id}: {reason}; see {log}."}


# --- what comes next ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The matrix of runs: methods times learning rates, then methods times seeds. With ``looks`` it grows: `rounds`."""

    output: Path
    methods: tuple[str, ...]
    # {method: the rates that it tries}.
    rates: Mapping[str, tuple[float, ...]]
    seeds: int
    # Whether the unadapted model is evaluated too.
    base: bool = True
    # Further tasks on which each run and the base are evaluated.
    tasks: tuple[str, ...] = ()
    # Whether the run of the first seed searches the rate for all seeds (--budget).
    halved: bool = False
    # Whether a method whose best rate lies at the edge tries one more on that side.
    extends: bool = False
    # With --time: the methods that each call added.
    looks: tuple[tuple[str, ...], ...] = ()
    # Whether the time is over, so that a rate beyond an edge that was not tried stays out.
    over: bool = False
    # The seeds of methods that have more than ``seeds``.
    more: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def search(self, method: str) -> list[Cell]:
        """The runs that try a method's rates, all on seed 0: none for one rate; with ``halved`` one that searches."""
        if self.halved:
            return [Cell(method, None, 0)]
        rates = sorted(self.rates[method])
        return [Cell(method, rate, 0) for rate in rates] if rates[1:] else []

    def final(self, method: str, rate: float) -> list[Cell]:
        """The final runs. After a search the run of seed 0 exists already and is not repeated."""
        searched = self.halved and rate in self.rates[method]
        seeds = range(self.more.get(method, self.seeds))
        return [Cell(method, None if searched and not seed else rate, seed) for seed in seeds]


@dataclasses.dataclass(kw_only=True)
class MethodState:
    """The progress of one method. ``tries``: the runs that try its rates."""

    search: RateSearch
    searched: bool
    tries: list[Cell]
    final: list[Cell]
    skipped: dict[str, str] | None
    # Jobs not done yet, in order; for each cell only the next stage.
    waiting: list[Job]


def jobs_to_do(plan: Plan) -> list[Job]:
    """The jobs that can start now, in order of preference, including those in progress."""
    states = {method: state_of(plan, method) for method in plan.methods}
    found = [job for state in states.values() if not state.searched for job in state.waiting]
    final = [job for state in states.values() if state.searched for job in state.waiting]
    # The sort is stable: jobs of one seed keep the order of the methods.
    found += sorted(final, key=lambda job: job.cell.seed if job.cell else 0)
    return found + _open_jobs(plan, None)


def jobs_left(plan: Plan) -> list[Job]:
    """The remaining jobs. Before the rates are chosen, the jobs of final runs are placeholders."""
    left: list[Job] = []
    for method in plan.methods:
        state = state_of(plan, method)
        if state.skipped:
            continue
        cells = state.final
        if not state.searched:
            left += state.waiting
            cells = plan.final(method, plan.rates[method][0])
            # A search is the final run of its seed.
            left += [Job("train", cell) for cell in cells[1:]]
            left += [Job("measure", cell) for cell in cells]
            continue
        left += [job for cell in cells for job in _open_jobs(plan, cell)]
    return left + _open_jobs(plan, None)


def possible_jobs(plan: Plan) -> Iterator[Job]:
    """The jobs of earlier calls that this plan may need, for any choice of learning rates."""
    begun = {path.name.rpartition(".")[0] for path in (plan.output / "cells").glob("*")}
    cells: list[Cell | None] = [None]
    for method in plan.methods:
        rates = sorted(plan.rates[method])
        rates += [beyond(rates, rate) for rate in (rates[0], rates[-1]) if plan.extends]
        cells += [*plan.search(method), *(cell for rate in rates for cell in plan.final(method, rate))]
    jobs = (job for cell in dict.fromkeys(cells) for job in jobs_of(cell))
    return (job for job in jobs if job.name(plan.output).name in begun)


def state_of(plan: Plan, method: str) -> MethodState:
    """The state of a method, read from disk, so that it is the same after a kill."""
    search = plan.search(method)
    jobs = [Job("train", cell) for cell in search]
    outcomes = {job: outcome_of(job, plan.output) for job in jobs}
    reason = next((why for outcome in outcomes.values() if (why := _skip_reason(outcome))), None)
    found = _search(plan, search)
    if reason is not None:
        return MethodState(search=found, searched=True, tries=search, final=[], skipped=reason, waiting=[])
    open_jobs = [job for job, outcome in outcomes.items() if outcome is None]
    if open_jobs:
        return MethodState(search=found, searched=False, tries=search, final=[], skipped=None, waiting=open_jobs)
    if plan.extends and found["at_edge"] and found["chosen"] is not None:
        further = Cell(method, beyond([item["learning_rate"] for item in found["tried"]], found["chosen"]), 0)
        if outcome_of(Job("train", further), plan.output) is not None:
            search = [*search, further]
            found = _extended(plan, search, found)
        elif not plan.over:
            return MethodState(
                search=found, searched=False, tries=search, final=[], skipped=None, waiting=[Job("train", further)]
            )
    rate = found["chosen"] if search else plan.rates[method][0]
    if rate is None:
        return MethodState(search=found, searched=True, tries=search, final=[], skipped=None, waiting=[])
    cells = plan.final(method, rate)
    first = Job("train", cells[0])
    reason = _skip_reason(outcome_of(first, plan.output))
    waiting = [] if reason else [job for cell in cells for job in _open_jobs(plan, cell)[:1]]
    if not search:
        found = {"tried": _search(plan, cells[:1])["tried"], "chosen": rate, "at_edge": False}
    return MethodState(search=found, searched=True, tries=search, final=cells, skipped=reason, waiting=waiting)


def jobs_of(cell: Cell | None) -> list[Job]:
    """The jobs of a cell, in order; those of the base for None."""
    return [Job("measure", None)] if cell is None else [Job("train", cell), Job("measure", cell)]


def _open_jobs(plan: Plan, cell: Cell | None) -> list[Job]:
    """The jobs of a cell without an outcome. Nothing follows a failed training."""
    if cell is None and not plan.base:
        return []
    outcomes = {job: outcome_of(job, plan.output) for job in jobs_of(cell)}
    if any(job.stage == "train" and outcome and outcome.status == "failed" for job, outcome in outcomes.items()):
        return []
    return [job for job, outcome in outcomes.items() if outcome is None]


def beyond(rates: Iterable[float], edge: float) -> float:
    """The next rate beyond ``edge``, the lowest or highest of ``rates``, in a ratio as that to its neighbour."""
    _, near = sorted(rates, key=lambda rate: abs(math.log(rate / edge)))[:2]
    return float(f"{edge * edge / near:.2g}")


def _extended(plan: Plan, cells: list[Cell], found: RateSearch) -> RateSearch:
    """The search after one more rate, whose whole run, the last of ``cells``, stands against that at the edge."""
    *before, further = cells
    edge = before[0] if plan.halved else Cell(further.method, found["chosen"], 0)
    old, new = (_tried(plan, cell) for cell in (edge, further))
    is_better = new["value"] is not None and (old["value"] is None or new["value"] < old["value"])
    chosen = further.learning_rate if is_better else found["chosen"]
    tried = sorted([*found["tried"], new], key=lambda item: item["learning_rate"])
    return {"tried": tried, "chosen": chosen, "at_edge": is_better}


def _tried(plan: Plan, cell: Cell) -> SearchedRate:
    record = finished_record(plan.output, cell)
    return {
        "learning_rate": cell.learning_rate or 0.0,
        "metric": "eval_loss",
        "value": record.eval_loss if record else None,
        "steps": record.steps if record else None,
        "run": cell.id,
    }


def _search(plan: Plan, cells: list[Cell]) -> RateSearch:
    if plan.halved:
        return _halved(plan, cells[0])
    tried = [_tried(plan, cell) for cell in cells]
    chosen, at_edge = choose_rate({item["learning_rate"]: item["value"] for item in tried})
    return {"tried": tried, "chosen": chosen, "at_edge": at_edge}


def _halved(plan: Plan, cell: Cell) -> RateSearch:
    """The rate search of a run; each rate with its loss in the first round, in which all rates took part."""
    record = record_of(cell.folder(plan.output))
    found = None if record is None else record.rate_search
    if found is None:
        return {"tried": [], "chosen": None, "at_edge": False}
    trials: dict[float, list[RateTrial]] = {}
    for trial in found["trials"]:
        trials.setdefault(trial["learning_rate"], []).append(trial)
    tried: list[SearchedRate] = [
        {
            "learning_rate": rate,
            "metric": KEPT_ROWS_LOSS,
            "value": rounds[0]["loss"],
            "steps": rounds[-1]["steps"],
            "run": cell.id,
        }
        for rate, rounds in sorted(trials.items())
    ]
    chosen = found["chosen"]
    return {
        "tried": tried,
        "chosen": chosen,
        "at_edge": chosen in (tried[0]["learning_rate"], tried[-1]["learning_rate"]),
    }


def finished_record(output: Path, cell: Cell) -> RunRecord | None:
    """The record of a cell whose training is done; otherwise None."""
    outcome = outcome_of(Job("train", cell), output)
    return record_of(cell.folder(output)) if outcome is not None and outcome.status == "finished" else None


def _skip_reason(outcome: Outcome | None) -> dict[str, str] | None:
    return outcome.error if outcome is not None and outcome.cannot_run else None
