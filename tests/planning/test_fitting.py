"""Largest batch and longest row, against a search by brute force."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankwise.planning import MemoryEstimate, Workload
from rankwise.planning.fitting import (
    LINE_ROWS,
    LINE_TOKENS,
    Interpolating,
    Remembering,
    largest_batch,
    longest_row,
    verdict_of,
)
from toy_memory import toy_estimate

WORK = Workload(batch_size=4, max_length=128, r=8)


def bumpy(slope: int, bump: int, start: int):
    """Monotone, not linear: steps of allocations."""

    def estimate(method: str, workload: Workload) -> MemoryEstimate:
        peak = start + slope * workload.batch_size + bump * (workload.batch_size // 5) ** 2
        return MemoryEstimate(method, peak, {}, 0, 0, 0.0, False)

    return estimate


@settings(deadline=None, max_examples=100)
@example(slope=3, bump=0, start=7, memory=10)
@example(slope=3, bump=0, start=7, memory=9)
@given(slope=st.integers(1, 50), bump=st.integers(0, 30), start=st.integers(0, 200), memory=st.integers(0, 2000))
def test_the_largest_batch_is_that_of_brute_force(slope, bump, start, memory):
    """Two thousand rows are never within 2,000 bytes at a byte a row."""
    estimate = bumpy(slope, bump, start)

    def fits(rows: int) -> bool:
        return estimate("lora", dataclasses.replace(WORK, batch_size=rows)).peak_bytes <= memory

    fitting = list(itertools.takewhile(fits, range(1, 2002)))
    assert largest_batch(estimate, "lora", WORK, memory) == max(fitting, default=0)


def test_few_questions_are_asked():
    asked = []

    def counting(method, workload):
        asked.append(workload)
        return toy_estimate(method, workload)

    assert largest_batch(counting, "lora", WORK, 20 * 10**9) > 100
    assert len(asked) < 30


def test_the_longest_row_is_the_last_that_fits():
    memory = 8 * 10**9
    tokens = longest_row(toy_estimate, "lora", WORK, memory)
    longest = dataclasses.replace(WORK, max_length=tokens)
    assert toy_estimate("lora", longest).peak_bytes <= memory
    assert toy_estimate("lora", dataclasses.replace(longest, max_length=tokens + 1)).peak_bytes > memory


def test_nothing_fits_in_nothing():
    assert largest_batch(toy_estimate, "lora", WORK, 1000) == 0
    assert longest_row(toy_estimate, "lora", WORK, 1000) == 0


@pytest.mark.parametrize(("memory", "verdict"), [(1050, "fits"), (1049, "tight"), (1000, "tight"), (999, "too big")])
def test_tight_is_what_only_fits_without_the_error(memory, verdict):
    assert verdict_of(MemoryEstimate("lora", 1000, {}, 0, 0, 0.05, False), memory) == verdict


def test_an_anchored_estimate_is_exact_at_its_anchor_and_scaled_elsewhere():
    remembering = Remembering(toy_estimate)
    plain = toy_estimate("lora", WORK)
    better = dataclasses.replace(plain, peak_bytes=round(1.1 * plain.peak_bytes), exact=True)
    remembering.anchor("lora", WORK, better)
    assert remembering("lora", WORK) is better
    other = dataclasses.replace(WORK, batch_size=16)
    assert remembering("lora", other).peak_bytes == pytest.approx(
        1.1 * toy_estimate("lora", other).peak_bytes, rel=1e-6
    )
    assert remembering("dora", WORK) == toy_estimate("dora", WORK)


def test_a_line_through_two_dry_runs_meets_a_linear_peak():
    asked = []

    def slow(method, workload):
        asked.append(workload)
        return toy_estimate(method, workload)

    line = Interpolating(slow)
    for rows in (1, 3, 64):
        for tokens in (128, 4096):
            work = dataclasses.replace(WORK, batch_size=rows, max_length=tokens)
            assert line("lora", work).peak_bytes == pytest.approx(toy_estimate("lora", work).peak_bytes, rel=1e-6)
    assert len(asked) == 2


@pytest.mark.parametrize("optimizer_bytes", [10**9, 2 * 10**10, 2 * 10**11])
def test_a_peak_in_the_optimizer_s_step_is_no_slope(optimizer_bytes):
    """Full fine-tuning holds more in its optimizer's step than small batches do in their activations."""
    asked = []

    def two_phases(method, workload):
        asked.append(workload)
        steps = toy_estimate(method, workload)
        if steps.peak_bytes >= optimizer_bytes:
            return dataclasses.replace(steps, phase="backward")
        return dataclasses.replace(
            steps, peak_bytes=optimizer_bytes, breakdown={"weights": optimizer_bytes}, phase="optimizer"
        )

    memory = 10**12
    assert largest_batch(Interpolating(two_phases), "lora", WORK, memory) == largest_batch(
        two_phases, "lora", WORK, memory
    )
    assert len([work for work in asked if work.max_length == LINE_TOKENS]) <= len(LINE_ROWS)


def test_batch_and_length_ask_for_no_further_run():
    asked = []

    def slow(method, workload):
        asked.append(workload)
        return toy_estimate(method, workload)

    line = Interpolating(slow)
    largest_batch(line, "lora", WORK, 20 * 10**9)
    longest_row(line, "lora", WORK, 20 * 10**9)
    assert len(asked) == 2
