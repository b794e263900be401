"""Choose the next jobs from the finished ones: searches first, then one seed after the other over all methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from rankwise.comparison.stages import Cell, Job, Outcome, choose_rate, outcome_of
from rankwise.errors import RunError
from rankwise.records import RUN_FILE, RunRecord, load_record
from rankwise.reports.comparison import KEPT_ROWS_LOSS, RateSearch, SearchedRate


@dataclasses.dataclass(frozen=True)
class Plan:
    """The matrix of runs: methods times learning rates, then methods times seeds."""

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

    def search(self, method: str) -> list[Cell]:
        """The runs that try a method's rates, all on seed 0: none for one rate; with ``halved`` one that searches."""
        if self.halved:
            return [Cell(method, None, 0)]
        rates = sorted(self.rates[method])
        return [Cell(method, rate, 0) for rate in rates] if rates[1:] else []

    def final(self, method: str, rate: float) -> list[Cell]:
        """The final runs. After a search the run of seed 0 exists already and is not repeated."""
        return [Cell(method, None if self.halved and not seed else rate, seed) for seed in range(self.seeds)]


@dataclasses.dataclass
class MethodState:
    """The progress of one method."""

    search: RateSearch
    searched: bool
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
        cells += [*plan.search(method), *(cell for rate in plan.rates[method] for cell in plan.final(method, rate))]
    jobs = (job for cell in dict.fromkeys(cells) for job in jobs_of(cell))
    return (job for job in jobs if job.name(plan.output).name in begun)


def state_of(plan: Plan, method: str) -> MethodState:
    """The state of a method, read from disk, so that it is the same after a kill."""
    search = plan.search(method)
    jobs = [Job("train", cell) for cell in search]
    outcomes = {job: outcome_of(job, plan.output) for job in jobs}
    reason = next((why for outcome in outcomes.values() if (why := _skip_reason(outcome))), None)
    if reason is not None:
        return MethodState(_search(plan, search), True, [], reason, [])
    open_jobs = [job for job, outcome in outcomes.items() if outcome is None]
    if open_jobs:
        return MethodState(_search(plan, search), False, [], None, open_jobs)
    found = _search(plan, search)
    rate = found["chosen"] if search else plan.rates[method][0]
    if rate is None:
        return MethodState(found, True, [], None, [])
    cells = plan.final(method, rate)
    first = Job("train", cells[0])
    reason = _skip_reason(outcome_of(first, plan.output))
    waiting = [] if reason else [job for cell in cells for job in _open_jobs(plan, cell)[:1]]
    if not search:
        found = {"tried": _search(plan, cells[:1])["tried"], "chosen": rate, "at_edge": False}
    return MethodState(found, True, cells, reason, waiting)


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


def _search(plan: Plan, cells: list[Cell]) -> RateSearch:
    if plan.halved:
        return _halved(plan, cells[0])
    tried: list[SearchedRate] = []
    for cell in cells:
        record = finished_record(plan.output, cell)
        assert cell.learning_rate is not None
        tried.append(
            {
                "learning_rate": cell.learning_rate,
                "metric": "eval_loss",
                "value": record.eval_loss if record else None,
                "steps": record.steps if record else None,
                "run": cell.id,
            }
        )
    chosen, at_edge = choose_rate({item["learning_rate"]: item["value"] for item in tried})
    return {"tried": tried, "chosen": chosen, "at_edge": at_edge}


def _halved(plan: Plan, cell: Cell) -> RateSearch:
    """The rate search of a run; each rate with its loss in the first round, in which all rates took part."""
    folder = cell.folder(plan.output)
    found = load_record(folder).rate_search if (folder / RUN_FILE).is_file() else None
    if found is None:
        return {"tried": [], "chosen": None, "at_edge": False}
    first, last = (
        {trial["learning_rate"]: trial for trial in trials} for trials in (found["trials"][::-1], found["trials"])
    )
    tried: list[SearchedRate] = [
        {
            "learning_rate": rate,
            "metric": KEPT_ROWS_LOSS,
            "value": first[rate]["loss"],
            "steps": last[rate]["steps"],
            "run": cell.id,
        }
        for rate in sorted(first)
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
    if outcome is None or outcome.status != "finished":
        return None
    try:
        return load_record(cell.folder(output))
    except RunError:
        return None


def _skip_reason(outcome: Outcome | None) -> dict[str, str] | None:
    return outcome.error if outcome is not None and outcome.cannot_run else None
