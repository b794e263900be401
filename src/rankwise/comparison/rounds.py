"""A comparison with ``--time``: which runs come next, until it is decided or the time is over.

Every method searches its rate and runs with the first seeds; after each look (`statistics.LOOKS`) further seeds go to
the methods that may still be best. What was looked at follows from the runs on disk and from the methods that each call
added, so an interrupted comparison, or one with more time or methods, goes on where it was.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rankwise.comparison.conclusion import concluded
from rankwise.comparison.settings import CompareSettings, seconds_of
from rankwise.comparison.stages import Cell, Job, Plan, jobs_to_do, outcome_of, state_of
from rankwise.comparison.statistics import LOOKS
from rankwise.comparison.verdicts import Scores, Spreads, next_seeds
from rankwise.foreign import read_json
from rankwise.records import write_json
from rankwise.reports.comparison import Conclusions
from rankwise.reports.numbers import duration, plural
from rankwise.reports.words import detectable, standing

LOOKS_FILE = "looks.json"
OVER = "the time is over"


def noted_calls(output: Path, methods: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The methods that each call added, these included; written into the folder, for their share of the error."""
    path = output / LOOKS_FILE
    calls = read_json(path)["methods"] if path.is_file() else []
    if added := [name for name in methods if not any(name in call for call in calls)]:
        calls = [*calls, added]
        write_json(path, {"methods": calls})
    return tuple(map(tuple, calls))


def with_seeds_on_disk(plan: Plan) -> Plan:
    """The plan with all the seeds that earlier calls ran."""
    more: dict[str, int] = {}
    for method in plan.methods:
        rate = state_of(plan, method).search["chosen"]
        cells = [Cell(method, rate, seed) for seed in range(plan.seeds, LOOKS[-1])]
        begun = [cell.seed + 1 for cell in cells if outcome_of(Job("train", cell), plan.output)]
        more |= {method: max(begun)} if begun else {}
    return dataclasses.replace(plan, more=more)


class Rounds:
    """The runs that come next. ``why`` says why there are no more."""

    def __init__(self, given: CompareSettings, plan: Plan) -> None:
        self.given = given
        self.plan = with_seeds_on_disk(plan) if given.time else plan
        self.ends = time.monotonic() + seconds_of(given.time or "")
        self.why = "it is decided"

    def jobs(self) -> list[Job]:
        """The jobs that may start now and would end in time; what was trained is measured in any case. Without --time
        those of the fixed plan.
        """
        if self.given.time is None:
            return jobs_to_do(self.plan)
        while not (jobs := jobs_to_do(self.plan)) and self._has_grown():
            pass
        fitting = [job for job in jobs if job.stage == "measure" or self.fits_in_time(job)]
        if jobs and not fitting and not self.plan.over:
            self.why, self.plan = OVER, dataclasses.replace(self.plan, over=True)
            # The best run of a method that has not tried a rate beyond its edge is to be measured.
            return self.jobs()
        return fitting

    def _has_grown(self) -> bool:
        """Look at the verdicts, and give further seeds to the methods that may still be best."""
        if (seen := self._seen()) is None:
            return False
        found, scores, spreads = seen
        seeds = {name: self.plan.more.get(name, self.plan.seeds) for name in self.plan.methods}
        more = next_seeds(found, scores[self.given.metric], spreads, seeds)
        if not more and not found["recommendation"]["decided"]:
            self.why = "more seeds would not decide it"
        self.plan = dataclasses.replace(self.plan, more={**self.plan.more, **more})
        return bool(more)

    def _seen(self) -> tuple[Conclusions, dict[str, dict[str, Scores]], Spreads] | None:
        """What follows from the runs so far; None before the first one has ended."""
        try:
            return concluded(self.given, self.plan)
        except LookupError:
            return None

    def fits_in_time(self, job: Job) -> bool:
        assert job.cell is not None
        return time.monotonic() + self.seconds_of(job.cell) < self.ends

    def seconds_of(self, cell: Cell) -> float:
        """The time of a run and its measurement: as its method's runs took, or else all; 0 before the first one."""
        took = {path.name: read_json(path)["seconds"] for path in (self.plan.output / "cells").glob("*.*.json")}
        found = 0.0
        for stage in ("train", "measure"):
            ended = {name: seconds for name, seconds in took.items() if name.endswith(f"{stage}.json")}
            own = [seconds for name, seconds in ended.items() if name.startswith(f"{cell.method}-")]
            found += fmean(own or ended.values()) if ended else 0.0
        return found

    def told(self, job: Job) -> str:
        """The standings after a run, and what comes next."""
        if (seen := self._seen()) is None:
            return ""
        known = standing(seen[0], self.given.metric)
        following = next((other for other in self.jobs() if other.cell and other != job), None)
        if following is None or following.cell is None:
            return f"{known}; next: nothing"
        left = max(0.0, self.ends - time.monotonic())
        runs = plural(int(left / max(1.0, self.seconds_of(following.cell))), "run")
        return f"{known}; next: {following.id}; {duration(left)} left, about {runs}"

    def ended(self) -> str:
        """Why no more runs follow, and what another such time would buy."""
        said, seen = f"Stopped: {self.why}.", self._seen()
        if seen is None:
            return said
        found, scores, spreads = seen
        effect, told = found["minimum_detectable_effect"], found["recommendation"]
        which = "evaluation rows" if spreads.of_rows(effect["seeds"]) else "seeds"
        if not told["decided"] and spreads.estimates:
            said += f" The spread over {which} is the larger part of the error."
        if self.why != OVER:
            return said
        each = fmean([self.seconds_of(Cell(name, None, 0)) for name in scores[self.given.metric]])
        runs = int(seconds_of(self.given.time or "") / max(1.0, each))
        seeds = min(LOOKS[-1], effect["seeds"] + runs // (1 + len(told["open"])))
        then = spreads.effect(seeds, effect["comparisons"])
        is_known = then["absolute"] is not None and seeds >= LOOKS[0]
        size = f", which would find {detectable(then, '')}" if is_known else ""
        more = f"{plural(runs, 'run')}, up to {plural(seeds, 'seed')}{size}"
        return f"{said} The same command again, for as much time, holds about {more}."
