"""Carry out the steps of a comparison, several at a time: each is a process of its own, here or on a Ray cluster.

The outcome of each step is on disk before the next ones are chosen. A kill of the comparison, of a step or of a node
of the cluster loses nothing that had ended, and a training goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from rankwise.comparison import stages
from rankwise.comparison.stages import Job, Outcome, beside
from rankwise.compat import system
from rankwise.disk import InUse, hold
from rankwise.errors import DataError, Interrupted, RunError, heard
from rankwise.foreign import JsonObject
from rankwise.models.device import usable_cores
from rankwise.planning.hardware import this_machine

TICK_SECONDS = 1.0
# The time that a run has to save its step after it was asked to stop.
STOP_SECONDS = 120.0
# A step that loses its machine more often than this counts as killed, and the other steps continue.
MOST_LOSSES = 3
# The exit code of a step whose machine is gone.
LOST = -1000
# Timeout for the connection to the head node of a Ray cluster.
ANSWER_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Call:
    """A step in progress.

    ``wait`` returns its exit code, negative where a signal ended it. ``stop`` asks it to save and exit, as Ctrl-C
    would, and the second time to exit at once.
    """

    wait: Callable[[], int]
    stop: Callable[[], object]


# Starts ``python -m module arguments`` with a name for its files and its own environment variables.
Start = Callable[[str, Sequence[str], Path, Mapping[str, str]], Call]


def start(module: str, arguments: Sequence[str], name: Path, environment: Mapping[str, str]) -> Call:
    """Start a step on this machine. stdout goes to ``NAME.out``; stderr is appended to ``NAME.log``.

    The process gets no signals from the terminal: its parent decides when it stops.
    """
    with open(beside(name, ".out"), "wb") as out, open(beside(name, ".log"), "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env={**os.environ, **environment},
            **system.child_options(),
        )
    return Call(process.wait, partial(process.send_signal, system.ASK_TO_STOP))


def environments(jobs: int, device: str) -> list[dict[str, str]]:
    """The environment of each parallel slot: its own device, or an equal part of the CPU's cores."""
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


# For Ray, before it is imported: no telemetry, and none of the log lines of a lost node, which it prints to stdout.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A connected Ray cluster. ``needs``: the cores and GPUs of a step; ``places``: how many steps run at a time."""

    needs: Mapping[str, float]
    places: int

    def start(self, module: str, arguments: Sequence[str], name: Path, environment: Mapping[str, str]) -> Call:
        """As `start`, on the node that Ray chooses."""
        import ray

        # Ray does not repeat a lost step: the runner starts it again, from its last checkpoint.
        task = ray.remote(max_retries=0, **self.needs)(_on_node)
        reference = task.remote(module, list(arguments), str(name), dict(environment), os.getcwd())
        return Call(partial(_code_of, reference), partial(ray.cancel, reference))


def connect(address: str | None, device: str) -> Cluster:
    """Join the running cluster at ``address`` (default: RAY_ADDRESS, else the one on this machine).

    A step takes one GPU and its share of the node's cores; on a cluster without GPUs, or with ``device`` "cpu", it
    takes all cores of the smallest node. Raises RunError (RW555) without Ray or without a cluster.
    """
    if system.WINDOWS:
        raise RunError("RW555", "--executor ray was never tried on Windows; leave it out, or use Linux (WSL).")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise RunError("RW555", "--executor ray needs Ray; run `pip install ray`.") from None
    try:
        address = address or os.environ.get("RAY_ADDRESS")
        if address is not None and (port := address.rpartition(":")[2]).isdecimal():
            # Ray itself would retry for minutes.
            socket.create_connection((address.rpartition(":")[0], int(port)), ANSWER_SECONDS).close()
        ray.init(address or "auto", log_to_driver=False, ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        at = f"at {address}" if address else "on this machine"
        reason = str(error).splitlines()[0]
        raise RunError("RW555", f"no Ray cluster answers {at} ({reason}); start one: ray start --head.") from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise RunError("RW555", "no node of the Ray cluster has cores; start one: ray start --address ADDRESS.")
    cards = [node for node in nodes if node.get("GPU")] if device != "cpu" else []
    if cards:
        needs = {"num_gpus": 1.0, "num_cpus": min(max(1.0, node["CPU"] // node["GPU"]) for node in cards)}
        return Cluster(needs, int(sum(node["GPU"] for node in cards)))
    cores = min(node["CPU"] for node in nodes)
    return Cluster({"num_cpus": cores}, int(sum(node["CPU"] // cores for node in nodes)))


def _code_of(reference: Any) -> int:
    """The exit code of a task, LOST if its node or its worker is gone.

    Raises RunError (RW555) if a node cannot see the comparison's folder.
    """
    import ray
    from ray import exceptions

    try:
        return int(ray.get(reference))
    except exceptions.TaskCancelledError:
        return -signal.SIGINT
    except exceptions.RayTaskError as error:
        raise RunError("RW555", f"{str(error.cause) or error}.") from None
    except exceptions.RayError:
        return LOST


def _on_node(module: str, arguments: list[str], name: str, environment: dict[str, str], folder: str) -> int:
    """Run one step on this node and return its exit code. Cancelling the task interrupts the step as Ctrl-C does."""
    place = Path(folder, name)
    if not place.parent.is_dir():
        raise FileNotFoundError(
            f"the node {socket.gethostname()} cannot see {place.parent}; give --output on a file system that all "
            "nodes share, under the same path"
        )
    os.chdir(folder)
    call = start(module, arguments, Path(name), environment)
    try:
        return call.wait()
    except KeyboardInterrupt:
        call.stop()
        return call.wait()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """The state of the whole matrix at one moment, in runs, each a training."""

    done: int
    # Those in progress included.
    left: int
    # None before any job has ended.
    seconds_left: float | None
    failed: int = 0
    # Stopped on request in this call; they are in no other count.
    interrupted: int = 0
    # With --time, after a run was measured.
    standing: str = ""


class Watcher(Protocol):
    """Who is told of the progress."""

    def started(self, job: Job) -> None: ...
    def ended(self, job: Job, outcome: Outcome, picture: Picture) -> None: ...
    def say(self, text: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Started:
    """A step in progress, its place, and since when it runs."""

    slot: int
    call: Call
    began: float


@dataclasses.dataclass(kw_only=True)
class Pool:
    """Carries out the jobs of ``next_jobs`` until it returns none."""

    output: Path
    # The module to run for a job and its arguments.
    command: Callable[[Job], tuple[str, list[str]]]
    # The environment of each parallel slot: its device and number of threads.
    environments: Sequence[Mapping[str, str]]
    watcher: Watcher
    left: Callable[[], Sequence[Job]]
    # Starts a step elsewhere than on this machine.
    start: Start | None = None
    # What is known of the methods after a run, in words.
    standing: Callable[[Job], str] | None = None
    running: dict[Job, Started] = dataclasses.field(default_factory=dict)
    futures: dict[Future[int], Job] = dataclasses.field(default_factory=dict)
    lost: Counter[Job] = dataclasses.field(default_factory=Counter)
    spent: list[tuple[Job, float]] = dataclasses.field(default_factory=list)
    done: int = 0
    failed: int = 0
    interrupted: set[Job] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        (self.output / "cells").mkdir(exist_ok=True)

    def carry_out(self, next_jobs: Callable[[], list[Job]]) -> None:
        """Run all jobs. After Ctrl-C or SIGTERM, give every run STOP_SECONDS to save its step, and raise Interrupted
        (RW587).
        """
        told = False
        # A thread for each slot, which waits for the step there.
        self.threads = ThreadPoolExecutor(len(self.environments))
        try:
            while True:
                jobs = [job for job in next_jobs() if job not in self.running]
                if not self.running and not jobs:
                    return
                for job in jobs:
                    if len(self.running) == len(self.environments):
                        break
                    if not _is_held(job.folder(self.output)):
                        self._start(job)
                    elif not told:
                        told = True
                        self.watcher.say("A run of an earlier call is still saving; waiting for it.")
                if self.running:
                    self._end_those(None)
                else:
                    time.sleep(TICK_SECONDS)
        except KeyboardInterrupt:
            self._stop()
            saved = "every run has saved its last step"
            if late := ", ".join(job.id for job in self.running):
                saved = f"{late} had not saved the last step after {STOP_SECONDS:g} seconds"
            raise Interrupted("RW587", f"stopped; {saved}, and the same command continues {self.output}.") from None
        finally:
            for step in self.running.values():
                step.call.stop()
            self.threads.shutdown(wait=False)

    def _start(self, job: Job) -> None:
        slot = min({*range(len(self.environments))} - {step.slot for step in self.running.values()})
        module, arguments = self.command(job)
        call = (self.start or start)(module, arguments, job.name(self.output), self.environments[slot])
        self.running[job] = Started(slot, call, time.monotonic())
        self.futures[self.threads.submit(call.wait)] = job
        self.watcher.started(job)

    def _end_those(self, timeout: float | None, *, stopping: bool = False) -> None:
        """Record the steps that end within ``timeout`` seconds, which stops at the first."""
        ended, _ = wait(self.futures, timeout, FIRST_COMPLETED)
        for future in ended:
            self._end(self.futures.pop(future), future.result(), stopping=stopping)

    def _end(self, job: Job, code: int, *, stopping: bool = False) -> None:
        seconds = round(time.monotonic() - self.running.pop(job).began, 3)
        if code == LOST:
            self.lost[job] += 1
            if self.lost[job] < MOST_LOSSES and not stopping:
                self.watcher.say(f"{job.id}: its machine is gone; the step starts again on a different one.")
                return
            code = -system.KILLED
        if stopping and code:
            # A step that was asked to stop may end with any code: with 1 if the signal came while Python started.
            code = -signal.SIGINT
        document = document_in(beside(job.name(self.output), ".out"))
        found = stages.outcome_from(job, self.output, code, document, seconds)
        outcome = dataclasses.replace(found, alone=len(self.environments) == 1)
        if outcome.is_interrupted:
            self.interrupted.add(job)
        else:
            self.spent.append((job, outcome.seconds))
            self.done += job.stage == "train" and outcome.status == "finished"
            self.failed += outcome.status == "failed"
        if not (stopping and outcome.is_interrupted) and not outcome.of_data:
            # Where only this step was interrupted, the outcome keeps this call from restarting it endlessly.
            stages.keep_outcome(job, self.output, outcome)
        is_measured = job.stage == "measure" and job.cell is not None and not stopping
        told = self.standing(job) if self.standing and is_measured else ""
        self.watcher.ended(job, outcome, dataclasses.replace(self.picture(), standing=told))
        if outcome.of_data and outcome.error is not None:
            raise DataError(**outcome.error)

    def _stop(self) -> None:
        for step in self.running.values():
            step.call.stop()
        deadline = time.monotonic() + STOP_SECONDS
        while self.futures and (left := deadline - time.monotonic()) > 0:
            self._end_those(left, stopping=True)

    def picture(self) -> Picture:
        left = [job for job in self.left() if job not in self.interrupted]
        pace = self._seconds_left(left) if self.spent else None
        runs = sum(job.stage == "train" for job in left)
        interrupted = sum(job.stage == "train" for job in self.interrupted)
        return Picture(done=self.done, left=runs, seconds_left=pace, failed=self.failed, interrupted=interrupted)

    def _seconds_left(self, left: Sequence[Job]) -> float:
        """The seconds that the remaining jobs take, each as the mean of its stage so far, or else of all."""
        everything = [seconds for _, seconds in self.spent]
        usual = {
            stage: fmean([seconds for job, seconds in self.spent if job.stage == stage] or everything)
            for stage in {job.stage for job in left}
        }
        return sum(usual[job.stage] for job in left) / len(self.environments)


def _is_held(folder: Path) -> bool:
    """Whether a process, which an earlier call started, still writes to ``folder``."""
    try:
        with heard(lambda warning: False), hold(folder):
            return False
    except InUse:
        return True


def document_in(stdout: Path) -> JsonObject:
    """The JSON document in the output of a step; empty if there is none."""
    try:
        found = json.loads(stdout.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def forget_unfinished(output: Path, jobs: Sequence[Job], *, retry: bool) -> None:
    """Let interrupted jobs run again, and with ``retry`` all failed ones too."""
    for job in jobs:
        outcome = stages.outcome_of(job, output)
        if outcome is not None and outcome.status == "failed" and (retry or outcome.again):
            stages.forget_outcome(job, output)
