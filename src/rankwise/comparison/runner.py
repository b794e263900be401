"""Run a matrix of jobs: one process for each step, several in parallel. Each outcome is on disk before the next jobs
are chosen.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rankwise.comparison import processes, stages
from rankwise.comparison.stages import Job, Outcome
from rankwise.errors import Interrupted
from rankwise.foreign import JsonObject, read_json
from rankwise.models.device import usable_cores
from rankwise.planning.hardware import this_machine
from rankwise.records import write_json

POLL_SECONDS = 0.2
# The time that a run has to save its step after it was asked to stop.
STOP_SECONDS = 120.0
# A step that loses its machine more often than this counts as killed, and the other steps continue.
MOST_LOSSES = 3
STATE_FILE = "state.json"


@dataclasses.dataclass(frozen=True)
class Running:
    """A job in progress, for the display. ``step`` and ``total`` are 0 for jobs without steps."""

    job: Job
    seconds: float
    step: int
    total: int


@dataclasses.dataclass(frozen=True)
class Picture:
    """The state of the whole matrix at one moment."""

    running: Sequence[Running]
    done: int
    # Number of remaining jobs, including those in progress.
    left: int
    # None before any job has ended.
    seconds_left: float | None
    failed: int = 0
    # Number of jobs of this call that were stopped on request, which are in no other count.
    interrupted: int = 0


class Started(Protocol):
    """A step in progress: a process here, or a task elsewhere."""

    def poll(self) -> int | None: ...
    def seconds(self) -> float: ...
    def stop(self) -> None: ...
    def document(self) -> JsonObject: ...


class Watcher(Protocol):
    """The interface of a progress display."""

    def started(self, job: Job) -> None: ...
    def ended(self, job: Job, outcome: Outcome, picture: Picture) -> None: ...
    def tick(self, picture: Picture) -> None: ...
    def say(self, text: str) -> None: ...


@dataclasses.dataclass
class Runner:
    """Starts the jobs of ``next_jobs`` until it returns none."""

    output: Path
    # The module to run for a job and its arguments.
    command: Callable[[Job], tuple[str, list[str]]]
    total_steps: Callable[[Job], int]
    # The environment of each parallel slot: its device and number of threads.
    environments: Sequence[Mapping[str, str]]
    watcher: Watcher
    clock: Clock
    left: Callable[[], Sequence[Job]]
    # Starts a step elsewhere than in a process on this machine.
    start: Callable[[str, Sequence[str], Path, Mapping[str, str]], Started] | None = None
    # {job: (its process, its slot)}.
    running: dict[Job, tuple[Started, int]] = dataclasses.field(default_factory=dict)
    lost: Counter[Job] = dataclasses.field(default_factory=Counter)
    spent: list[tuple[Job, float]] = dataclasses.field(default_factory=list)
    done: int = 0
    failed: int = 0
    interrupted: set[Job] = dataclasses.field(default_factory=set)

    def carry_out(self, next_jobs: Callable[[], list[Job]]) -> None:
        """Run all jobs. After Ctrl-C or SIGTERM, give every run STOP_SECONDS to save its step, and raise Interrupted
        (RW587).
        """
        told = False
        try:
            while True:
                jobs = [job for job in next_jobs() if job not in self.running]
                free = [job for job in jobs if not processes.is_locked(self._name(job))]
                if len(free) < len(jobs) and not told:
                    told = True
                    self.watcher.say("A run of an earlier call is still saving; waiting for it.")
                for job in free[: len(self.environments) - len(self.running)]:
                    self._start(job)
                if not self.running and not jobs:
                    return
                self._wait()
        except KeyboardInterrupt:
            self._stop()
            saved = "every run has saved its last step"
            if late := ", ".join(job.id for job in self.running):
                saved = f"{late} had not saved the last step after {STOP_SECONDS:g} seconds"
            raise Interrupted("RW587", f"stopped; {saved}, and the same command continues {self.output}.") from None

    def _name(self, job: Job) -> Path:
        name = job.name(self.output)
        name.parent.mkdir(exist_ok=True)
        return name

    def _start(self, job: Job) -> None:
        slot = min(set(range(len(self.environments))) - {slot for _, slot in self.running.values()})
        module, arguments = self.command(job)
        start = self.start or processes.start
        worker = start(module, arguments, self._name(job), self.environments[slot])
        self.running[job] = worker, slot
        self.watcher.started(job)

    def _wait(self) -> None:
        """Wait until a process ends."""
        ticks = 0
        while True:
            self.clock.keep(sum(worker.seconds() for worker, _ in self.running.values()))
            ended = [(job, code) for job, (worker, _) in self.running.items() if (code := worker.poll()) is not None]
            for job, code in ended:
                self._end(job, code)
            if ended or not self.running:
                time.sleep(0 if ended else POLL_SECONDS)
                return
            if ticks % 5 == 0:
                self.watcher.tick(self.picture())
            ticks += 1
            time.sleep(POLL_SECONDS)

    def _end(self, job: Job, code: int, *, stopping: bool = False) -> None:
        worker, _ = self.running.pop(job)
        seconds = round(worker.seconds(), 3)
        self.clock.steps += seconds
        if code == processes.LOST:
            self.lost[job] += 1
            if self.lost[job] < MOST_LOSSES and not stopping:
                self.watcher.say(f"{job.id}: its machine is gone; the step starts again on another one.")
                return
            code = -signal.SIGKILL
        if stopping and code:
            # A step that was asked to stop may end with any code: with 1 if the signal came while Python started.
            code = -signal.SIGINT
        found = stages.outcome_from(job, self.output, code, worker.document(), seconds)
        outcome = dataclasses.replace(found, alone=len(self.environments) == 1)
        if outcome.is_interrupted:
            self.interrupted.add(job)
        else:
            self.spent.append((job, outcome.seconds))
            self.done += outcome.status == "finished"
            self.failed += outcome.status == "failed"
        if not (stopping and outcome.is_interrupted):
            # Where only this step was interrupted, the outcome keeps this call from restarting it endlessly.
            stages.keep_outcome(job, self.output, outcome)
        self.watcher.ended(job, outcome, self.picture())

    def _stop(self) -> None:
        for worker, _ in self.running.values():
            worker.stop()
        deadline = time.monotonic() + STOP_SECONDS
        while self.running and time.monotonic() < deadline:
            for job, code in [(job, worker.poll()) for job, (worker, _) in self.running.items()]:
                if code is not None:
                    self._end(job, code, stopping=True)
            time.sleep(POLL_SECONDS)

    def picture(self) -> Picture:
        running = [
            Running(job, worker.seconds(), stages.last_step(job.folder(self.output)), self.total_steps(job))
            for job, (worker, _) in self.running.items()
        ]
        left = [job for job in self.left() if job not in self.interrupted]
        pace = self._seconds_left(left, running)
        return Picture(running, self.done, len(left), pace, self.failed, len(self.interrupted))

    def _seconds_left(self, left: Sequence[Job], running: Sequence[Running]) -> float | None:
        """The seconds that the remaining jobs take at the speed so far, minus those that the running ones have used."""
        if not self.spent:
            return None
        total = sum(map(self._usual_seconds, left))
        total -= sum(min(item.seconds, self._usual_seconds(item.job)) for item in running)
        return max(0.0, total) / len(self.environments)

    def _usual_seconds(self, job: Job) -> float:
        """The mean seconds of similar jobs so far, of trainings scaled by steps, since searches may be shorter."""
        alike = [(done, seconds) for done, seconds in self.spent if done.stage == job.stage]
        steps = sum(self.total_steps(done) for done, _ in alike)
        if alike and steps:
            return self.total_steps(job) * sum(seconds for _, seconds in alike) / steps
        usual = [seconds for _, seconds in alike or self.spent]
        return sum(usual) / len(usual)


class Clock:
    """Adds the seconds of this call to those of earlier ones in ``state.json``. A kill loses a few seconds.

    The overhead of a call is the part of its time in which its lanes ran no step: ``total - steps / lanes``.
    """

    def __init__(self, output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / STATE_FILE
        self.before = seconds_spent(output)
        self.started = self.kept = time.monotonic()
        # Number of steps that run at a time.
        self.lanes = 1
        # Seconds of the steps of this call that have ended, interrupted and failed ones included.
        self.steps = 0.0

    def keep(self, running: float = 0.0, *, now: bool = False) -> None:
        """``running``: the seconds so far of the steps in progress."""
        if now or time.monotonic() - self.kept > 5:
            self.kept = time.monotonic()
            write_json(self.path, self.spent(running))

    def spent(self, running: float = 0.0) -> dict[str, float]:
        """The seconds of all calls: in total, in the steps' processes, and in the comparison itself."""
        total, runs = time.monotonic() - self.started, self.steps + running
        here = {"total": total, "runs": runs, "overhead": total - runs / self.lanes}
        return {name: round(self.before[name] + value, 3) for name, value in here.items()}


def seconds_spent(output: Path) -> dict[str, float]:
    """The seconds of all calls on this folder so far, as ``Clock.spent`` gives them."""
    try:
        found = read_json(output / STATE_FILE)
        return {name: float(found[name]) for name in ("total", "runs", "overhead")}
    except (OSError, ValueError, LookupError, TypeError):
        return dict.fromkeys(("total", "runs", "overhead"), 0.0)


def environments(jobs: int, device: str) -> list[dict[str, str]]:
    """The environment of each parallel slot: its own device, or an equal part of the CPU's cores."""
    import os

    gpus = 0
    if device == "cuda" or (device == "auto" and this_machine().device_type == "cuda"):
        import torch

        gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(index) for index in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if jobs > 1 else {} for slot in range(jobs)]
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(jobs)]
    return [{"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))} for _ in range(jobs)]


def forget_unfinished(output: Path, jobs: Sequence[Job], *, retry: bool) -> None:
    """Let interrupted jobs run again, and with ``retry`` all failed ones too."""
    for job in jobs:
        outcome = stages.outcome_of(job, output)
        if outcome is not None and outcome.status == "failed" and (retry or outcome.again):
            stages.forget_outcome(job, output)


def steps_of(folder: Path) -> list[tuple[int, float]]:
    """The (step, seconds of training so far) pairs that a run has logged."""
    from rankwise.records import read_metrics

    return [(line["step"], line["train_seconds"]) for line in read_metrics(folder) if "train_seconds" in line]
