"""Which steps run at a time, what is shown of them, and the time that is counted."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from rankwise.comparison import pool, stages
from rankwise.comparison.pool import Pool, environments
from rankwise.comparison.stages import Cell, Job
from rankwise.disk import hold
from rankwise.errors import Interrupted


class Watching:
    """Remembers what it sees, and lets the steps end once it has seen them run."""

    def __init__(self) -> None:
        self.pictures: list[Any] = []
        self.seen = threading.Event()

    def started(self, job: Job) -> None:
        self.seen.clear()

    def ended(self, job: Job, outcome: object, picture: object) -> None: ...
    def say(self, text: str) -> None: ...
    def tick(self, picture: object) -> None:
        self.pictures.append(picture)
        self.seen.set()


def of_steps(output: Path, *, steps: Any = lambda job: 0, places: int = 1, stop: Any = None) -> Pool:
    watcher = Watching()
    call = pool.Call(lambda: 0 if watcher.seen.wait(60) else 1, stop or (lambda: None))
    return Pool(output, lambda job: ("m", []), steps, [{}] * places, watcher, list, lambda *_: call)


def test_a_step_is_shown_as_soon_as_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("measure", Cell("lora", 1e-4, seed)) for seed in (0, 1)]
    carrying = of_steps(tmp_path)
    carrying.carry_out(lambda: [job for job in jobs if stages.outcome_of(job, tmp_path) is None])
    assert [item.job for picture in carrying.watcher.pictures for item in picture.running] == jobs


def test_a_step_that_does_not_stop_in_time_is_named_and_stopped_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "STOP_SECONDS", 0.01)
    asked: list[str] = []
    carrying = of_steps(tmp_path, stop=lambda: asked.append("to stop"))

    def interrupt(picture: object) -> None:
        raise KeyboardInterrupt

    carrying.watcher.tick = interrupt
    with pytest.raises(Interrupted, match="RW587: stopped; lora-lr0.0001-seed0 had not saved the last step after 0.01"):
        carrying.carry_out(lambda: [Job("train", Cell("lora", 1e-4, 0))])
    assert asked == ["to stop"] * 2
    carrying.watcher.seen.set()


def test_a_step_of_an_earlier_call_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "TICK_SECONDS", 0.01)
    job = Job("train", Cell("lora", 1e-4, 0))
    carrying, said = of_steps(tmp_path), []
    earlier = contextlib.ExitStack()
    earlier.enter_context(hold(job.folder(tmp_path)))

    def say(text: str) -> None:
        said.append((text, dict(carrying.running)))
        earlier.close()

    carrying.watcher.say = say
    carrying.carry_out(lambda: [] if stages.outcome_of(job, tmp_path) else [job])
    assert said == [("A run of an earlier call is still saving; waiting for it.", {})]
    assert stages.outcome_of(job, tmp_path).status == "finished"


def test_the_seconds_left_are_those_of_similar_steps_and_of_trainings_by_their_length(tmp_path: Path) -> None:
    steps = {seed: 10 * (seed + 1) for seed in range(4)}
    train, measure = ([Job(stage, Cell("lora", 1e-4, seed)) for seed in steps] for stage in ("train", "measure"))
    carrying = of_steps(tmp_path, steps=lambda job: steps[job.cell.seed] if job.stage == "train" else 0, places=2)
    assert carrying._seconds_left(train, []) is None
    # 30 steps took a minute, so that one takes two seconds.
    carrying.spent = [(train[0], 15.0), (train[1], 45.0), (measure[0], 4.0), (measure[1], 8.0)]
    left = [*train[2:], measure[3]]
    whole = 2.0 * (30 + 40) + 6.0
    assert carrying._seconds_left(left, []) == pytest.approx(whole / 2)
    begun = [pool.Running(train[2], 50.0, 0, 30), pool.Running(measure[3], 99.0, 0, 0)]
    assert carrying._seconds_left(left, begun) == pytest.approx((whole - 50 - 6) / 2)
    # Of a stage that has not run yet, the mean of all others.
    assert carrying._usual_seconds(Job("prepare", None)) == pytest.approx((15 + 45 + 4 + 8) / 4)


@pytest.mark.parametrize(("jobs", "threads"), [(1, None), (2, "4"), (3, "2"), (8, "1"), (20, "1")])
def test_steps_side_by_side_share_the_cores(jobs: int, threads: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert environments(jobs, "cpu") == [{} if threads is None else {"OMP_NUM_THREADS": threads}] * jobs
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environments(jobs, "cpu") == [{}] * jobs
