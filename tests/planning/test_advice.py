"""The largest batch that fits, the ladder of changes with their prices, and the one recommendation."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankwise.config import TrainSettings
from rankwise.methods import METHODS
from rankwise.planning import TERMS, MemoryEstimate, Workload
from rankwise.planning.advice import (
    LADDER,
    ROW_UNIT,
    RULES,
    Advisor,
    Situation,
    Wish,
    ladder,
    largest_batch,
    longest_row,
    recommend,
    verdict_of,
)
from rankwise.planning.workload import Goal
from toy_memory import PER_TOKEN, WEIGHTS, toy_estimate

SHORT = Workload(batch_size=4, max_length=128, r=8)
WORK = Workload(batch_size=8, max_length=1024, r=16)
GIVEN = {"model": "m", "r": 16, "target_modules": "all-linear", "batch_size": 8, "gradient_accumulation": 1}


def seconds(estimate, workload):
    """A second a thousand tokens and a tenth a micro-batch; recomputing costs half as much again."""
    factor = 1.5 if workload.gradient_checkpointing else 1.0
    return factor * workload.tokens / 1000 + 0.1 + (0.05 if estimate.method in ("qlora", "qdora") else 0)


def advisor(memory):
    return Advisor(toy_estimate, seconds, memory)


def advise(memory, methods=tuple(METHODS), goal="speed", workload=WORK, accumulation=1):
    given = {**GIVEN, "gradient_accumulation": accumulation, "batch_size": workload.batch_size}
    return recommend(advisor(memory), methods, workload, Wish(goal, given, accumulation))


def test_with_room_lora_is_taken_as_it_was_asked_for():
    advice = advise(100 * 10**9)
    assert advice.method == "lora"
    assert advice.settings == {**GIVEN, "method": "lora"}
    assert advice.reasons


def test_the_rows_of_a_step_are_kept_when_the_batch_shrinks():
    advice = advise(WEIGHTS + 1500 * PER_TOKEN)
    assert advice.method == "lora"
    assert advice.settings["batch_size"] * advice.settings["gradient_accumulation"] == 8
    assert advice.workload.batch_size == 4
    assert advice.workload.gradient_checkpointing


def test_checkpointing_alone_keeps_the_batch():
    """Where half the batch would do too."""
    advice = advise(WEIGHTS + 5 * 1024 * PER_TOKEN)
    assert (advice.method, advice.workload.batch_size) == ("lora", WORK.batch_size)
    assert advice.workload.gradient_checkpointing


def test_four_bits_only_where_sixteen_do_not_fit():
    advice = advise(WEIGHTS)
    assert advice.method == "qlora"
    assert any(rule.name == "qlora-needed" for rule in advice.reasons)


def test_quality_prefers_no_dora_without_evidence_and_rounds_last():
    advice = advise(100 * 10**9, goal="quality")
    assert advice.method == "lora"
    assert any("compare" in rule.reason for rule in advice.reasons)
    assert advise(WEIGHTS, goal="quality").method == "qlora"
    asked = advise(100 * 10**9, ("dora", "qlora"), goal="quality")
    assert asked.method == "dora"
    assert any(rule.evidence == "mixed" for rule in asked.reasons)


def test_what_is_recommended_fits_with_its_error_unless_it_says_that_it_does_not():
    for memory in range(3 * 10**8, 12 * 10**9, 3 * 10**8):
        for goal in get_args(Goal):
            advice = advise(memory, goal=goal)
            if advice.method is not None:
                assert advice.estimate.peak_bytes <= memory
                fits = advice.estimate.peak_bytes * (1 + advice.estimate.error) <= memory
                assert advice.is_tight is not fits


def test_a_run_that_is_only_tight_is_recommended_and_said_to_be():
    """Rather than that nothing fits where a row of the table does."""
    least = Workload(batch_size=1, max_length=16, r=8, gradient_checkpointing=True)
    memory = toy_estimate("lora", least).peak_bytes
    advice = advise(memory, methods=("lora",), workload=least)
    assert (advice.method, advice.is_tight, advice.missing_bytes) == ("lora", True, 0)
    assert advice.to_json()["tight"] is True
    assert advise(memory - 1, methods=("lora",), workload=least).method is None


def test_what_fits_with_its_error_comes_before_what_is_gentler_and_tight():
    memory = toy_estimate("lora", WORK).peak_bytes
    advice = advise(memory, methods=("lora",))
    assert not advice.is_tight
    assert advice.workload.gradient_checkpointing


def test_where_nothing_fits_the_lack_is_that_of_the_smallest_run():
    advice = advise(10**8)
    assert advice.method is None
    assert advice.missing_bytes == advice.estimate.peak_bytes - 10**8 > 0


def test_the_ladder_is_climbed_no_higher_than_it_must_be():
    """Checkpointing, half the batch, 8-bit states, four bits, shorter rows; every step costs what it costs."""
    steps = list(dict.fromkeys(step.name for step in ladder("lora", WORK, 1)))
    assert steps == ["checkpointing", "batch", "optimizer", "method", "length"]
    climbed = [advisor(memory).climbed("lora", WORK, 1, LADDER) for memory in (20e9, 7e9, 1.6e9, 0.9e9, 0.4e9, 1e8)]
    taken = [None if change is None else [step.name for step in change.steps] for change in climbed]
    assert taken == [[], steps[:1], steps[:2], steps[:4], steps, None]
    for change in climbed[:-1]:
        assert change.verdict == "fits"
        assert change.estimate == toy_estimate(change.method, change.workload)


def test_prices_are_those_of_the_estimates():
    for change in advisor(10**9).singles("lora", WORK, 1):
        before, after = toy_estimate("lora", WORK), toy_estimate(change.method, change.workload)
        assert change.saved_bytes == before.peak_bytes - after.peak_bytes > 0


def test_every_change_is_made_of_options_that_train_has():
    for method in METHODS:
        for step in ladder(method, WORK, 1):
            TrainSettings.model_validate({"model": "m", "data": "d", "output": "o", **step.settings})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("goal", get_args(Goal))
def test_some_rule_explains_every_recommendation(method, goal):
    narrow = method in ("qlora", "qdora")
    fits = {"lora": not narrow, "dora": not narrow}
    situation = Situation(
        method=method, goal=goal, fits=fits, settings={"r": 16, "target_modules": "all-linear"}, changed=frozenset()
    )
    assert any(rule.when(situation) for rule in RULES)


def test_a_mixture_is_not_told_that_all_linear_layers_are_all():
    settings = {"r": 16, "target_modules": "all-linear"}
    for method in ("lora", "qlora", "dora", "qdora"):
        situation = Situation(
            method=method, goal="speed", fits={"lora": False}, settings=settings, changed=frozenset(), is_mixture=True
        )
        names = {rule.name for rule in RULES if rule.when(situation)}
        assert "experts-left-out" in names
        assert "qlora-all-linear" not in names
    with_experts = settings | {"target_parameters": ("mlp.experts.down_proj",)}
    assert not Situation(
        method="qlora", goal="speed", fits={}, settings=with_experts, changed=frozenset(), is_mixture=True
    ).leaves_experts
    dense = Situation(method="qlora", goal="speed", fits={"lora": False}, settings=settings, changed=frozenset())
    names = {rule.name for rule in RULES if rule.when(dense)}
    assert "qlora-all-linear" in names
    assert "experts-left-out" not in names


def test_servers_are_told_of_every_setting_that_they_refuse_or_ignore():
    whole, scaled = ({"modules_to_save": ("lm_head",)}, {"use_rslora": True})
    places = [advise(100 * 10**9, workload=dataclasses.replace(WORK, **own)).serving for own in (whole, scaled)]
    assert "no server takes `modules_to_save` beside an adapter" in places[0]
    assert any("ignores rsLoRA's scale" in place for place in places[1])


# --- the largest batch, against a search by brute force ---


def bent(slope: int, bend: int, start: int):
    """The higher of two lines."""

    def estimate(method: str, workload: Workload) -> MemoryEstimate:
        peak = max(start + slope * workload.batch_size, bend * workload.batch_size)
        return MemoryEstimate(
            method=method,
            peak_bytes=peak,
            breakdown=dict.fromkeys(TERMS, 0),
            trainable_parameters=0,
            total_parameters=0,
            error=0.0,
        )

    return estimate


@settings(deadline=None, max_examples=100)
@example(slope=3, bend=0, start=7, memory=10)
@example(slope=3, bend=0, start=7, memory=9)
@given(slope=st.integers(1, 50), bend=st.integers(0, 99), start=st.integers(0, 200), memory=st.integers(0, 2000))
def test_the_largest_batch_fits_and_of_one_line_none_larger_does(slope, bend, start, memory):
    """Two thousand rows are never within 2,000 bytes at a byte a row."""
    estimate = bent(slope, bend, start)

    def fits(rows: int) -> bool:
        return estimate("lora", dataclasses.replace(SHORT, batch_size=rows)).peak_bytes <= memory

    most = max(itertools.takewhile(fits, range(1, 2002)), default=0)
    found = largest_batch(estimate, "lora", SHORT, memory)
    assert found == most or (bend > slope and most / 2 < found < most)


def test_few_questions_are_asked():
    asked = []

    def counting(method, workload):
        asked.append(workload)
        return toy_estimate(method, workload)

    assert largest_batch(counting, "lora", SHORT, 20 * 10**9) > 100
    assert len(asked) == 2


def test_the_longest_row_is_the_last_whole_unit_that_fits():
    memory = 8 * 10**9
    tokens = longest_row(toy_estimate, "lora", SHORT, memory)
    longest = dataclasses.replace(SHORT, max_length=tokens)
    assert toy_estimate("lora", longest).peak_bytes <= memory
    assert toy_estimate("lora", dataclasses.replace(longest, max_length=tokens + ROW_UNIT)).peak_bytes > memory


@pytest.mark.parametrize(
    ("memory", "mapped", "verdict"),
    [
        (1050, 0, "fits"),
        (1049, 0, "tight"),
        (1000, 0, "tight"),
        (999, 0, "too big"),
        (999, 400, "from disk"),
        (600, 400, "from disk"),
        (599, 400, "too big"),
    ],
)
def test_tight_is_what_only_fits_without_the_error(memory, mapped, verdict):
    assert (
        verdict_of(
            MemoryEstimate(
                method="lora", peak_bytes=1000, breakdown={}, trainable_parameters=0, total_parameters=0, error=0.05
            ),
            memory,
            mapped,
        )
        == verdict
    )
