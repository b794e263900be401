"""Which steps run at a time, how they stop, and the time that is left."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_comparison import Quiet

from rankwise.comparison import pool, stages
from rankwise.comparison.pool import Pool, environments
from rankwise.comparison.stages import Cell, Job
from rankwise.disk import hold
from rankwise.errors import Interrupted


class Watching(Quiet):
    """Lets the steps end once ``seen`` is set."""

    def __init__(self) -> None:
        self.seen = threading.Event()


def of_steps(output: Path, *, places: int = 1, stop: Any = None) -> Pool:
    watcher = Watching()
    call = pool.Call(lambda: 0 if watcher.seen.wait(60) else 1, stop or (lambda: None))
    return Pool(
        output=output,
        command=lambda job: ("m", []),
        environments=[{}] * places,
        watcher=watcher,
        left=list,
        start=lambda *_: call,
    )


def test_a_step_that_does_not_stop_in_time_is_named_and_stopped_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "STOP_SECONDS", 0.01)
    asked: list[str] = []
    carrying = of_steps(tmp_path, stop=lambda: asked.append("to stop"))

    def interrupt(job: object) -> None:
        raise KeyboardInterrupt

    carrying.watcher.started = interrupt
    with pytest.raises(Interrupted, match="RW587: stopped; lora-lr0.0001-seed0 had not saved the last step after 0.01"):
        carrying.carry_out(lambda: [Job("train", Cell("lora", 1e-4, 0))])
    assert asked == ["to stop"] * 2
    carrying.watcher.seen.set()


def test_a_step_of_an_earlier_call_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "TICK_SECONDS", 0.01)
    job = Job("train", Cell("lora", 1e-4, 0))
    carrying, said = of_steps(tmp_path), []
    carrying.watcher.seen.set()
    earlier = contextlib.ExitStack()
    earlier.enter_context(hold(job.folder(tmp_path)))

    def say(text: str) -> None:
        said.append((text, dict(carrying.running)))
        earlier.close()

    carrying.watcher.say = say
    carrying.carry_out(lambda: [] if stages.outcome_of(job, tmp_path) else [job])
    assert said == [("A run of an earlier call is still saving; waiting for it.", {})]
    assert stages.outcome_of(job, tmp_path).status == "finished"


def test_the_seconds_left_are_those_of_similar_steps(tmp_path: Path) -> None:
    train, measure = ([Job(stage, Cell("lora", 1e-4, seed)) for seed in range(4)] for stage in ("train", "measure"))
    carrying = of_steps(tmp_path, places=2)
    assert carrying.picture().seconds_left is None
    carrying.spent = [(train[0], 15.0), (train[1], 45.0), (measure[0], 4.0), (measure[1], 8.0)]
    assert carrying._seconds_left([*train[2:], measure[3]]) == pytest.approx((2 * 30 + 6) / 2)
    # Of a stage that has not run yet, the mean of all others.
    assert carrying._seconds_left([Job("prepare", None)]) == pytest.approx((15 + 45 + 4 + 8) / 4 / 2)


@pytest.mark.parametrize(("jobs", "threads"), [(1, None), (2, "4"), (3, "2"), (8, "1"), (20, "1")])
def test_steps_side_by_side_share_the_cores(jobs: int, threads: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert environments(jobs, "cpu") == [{} if threads is None else {"OMP_NUM_THREADS": threads}] * jobs
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environments(jobs, "cpu") == [{}] * jobs
