"""metrics.jsonl survives kills and resumptions; memory and time are measured in what they claim."""

from __future__ import annotations

import json
import mmap
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rankwise.records import METRICS_FILE, read_metrics
from rankwise.training.ranks import Interrupt, interrupts
from rankwise.training.watch import MemoryMeter, Progress, StepClock, append_metrics, begin_metrics, evaluations


def test_lines_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    begin_metrics(tmp_path, None)
    append_metrics(tmp_path, {"step": 0, "eval_loss": 3.0})
    for step in (2, 4, 6):
        append_metrics(tmp_path, {"step": step, "loss": float(step)})
    with (tmp_path / METRICS_FILE).open("a") as handle:
        handle.write('{"step": 8, "lo')
    begin_metrics(tmp_path, 4)
    append_metrics(tmp_path, {"step": 6, "loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 4, 6]
    assert evaluations(tmp_path) == {0: 3.0}


def test_a_new_run_starts_empty_and_values_that_are_no_numbers_become_null(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"step": 1, "loss": 2.0})
    begin_metrics(tmp_path, None)
    append_metrics(tmp_path, {"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert (tmp_path / METRICS_FILE).read_text() == json.dumps({"step": 1, "loss": None, "grad_norm": None}) + "\n"


def test_mean_loss_is_over_all_steps() -> None:
    assert Progress().mean_loss is None
    assert Progress(steps=4, loss_sum=6.0).mean_loss == 1.5


def test_clock_counts_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two steps of 2 and 3 seconds, 10 seconds apart.
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 2.0, 12.0, 15.0]).__next__)
    progress = Progress(train_seconds=5.0, tokens=100)
    clock = StepClock(progress)
    for _ in range(2):
        clock.start()
        clock.stop()
    progress.tokens += 50
    assert (clock.seconds, progress.train_seconds) == (5.0, 10.0)
    assert clock.tokens_per_second == 10.0
    assert clock.seconds_left(10) == 25.0


def test_memory_meter_sees_a_peak_between_two_looks() -> None:
    with MemoryMeter("cpu") as meter:
        before = meter.now()
        # An anonymous mapping, since an allocation of the heap may lie in pages that were held already.
        block = mmap.mmap(-1, 64_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(bytes(64_000_000))
        deadline = time.monotonic() + 10
        while meter.seen < before + 60_000_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        block.close()
        assert meter.peak() >= before + 60_000_000
    assert MemoryMeter("cpu", peak_bytes=10**15).peak() == 10**15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_and_second_ends(number: int) -> None:
    before = signal.getsignal(number)
    interrupt = Interrupt()
    with pytest.raises(KeyboardInterrupt), interrupts(interrupt):  # noqa: PT012
        os.kill(os.getpid(), number)
        assert interrupt.requested
        os.kill(os.getpid(), number)
        raise AssertionError("still running")
    assert signal.getsignal(number) is before


def test_interrupts_are_left_alone_outside_the_main_thread() -> None:
    seen: list[bool] = []

    def work() -> None:
        interrupt = Interrupt()
        with interrupts(interrupt):
            seen.append(interrupt.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
