"""Changes with their prices, and the one recommendation."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from rankwise.config import TrainSettings
from rankwise.planning import Workload
from rankwise.planning.changes import FAST, Advisor, possible_steps
from rankwise.planning.recommend import ORDER, Wish, recommend
from rankwise.planning.rules import RULES, Situation
from rankwise.planning.terms import PLANNED
from toy_memory import PER_TOKEN, WEIGHTS, toy_estimate

WORK = Workload(batch_size=8, max_length=1024, r=16)
GIVEN = {"model": "m", "r": 16, "target_modules": "all-linear", "batch_size": 8, "gradient_accumulation": 1}


def seconds(estimate, workload):
    """A second a thousand tokens and a tenth a micro-batch; recomputing costs half as much again."""
    factor = (1.5 if workload.gradient_checkpointing else 1.0) * (3.0 if workload.activation_offloading else 1.0)
    return factor * workload.tokens / 1000 + 0.1 + (0.05 if estimate.method in ("qlora", "qdora") else 0)


def advisor(memory):
    return Advisor(toy_estimate, seconds, memory)


def advise(memory, methods=PLANNED, goal="speed", workload=WORK, accumulation=1):
    given = {**GIVEN, "gradient_accumulation": accumulation, "batch_size": workload.batch_size}
    return recommend(advisor(memory), methods, workload, Wish(goal, given, accumulation))


def test_with_room_lora_is_taken_as_it_was_asked_for():
    advice = advise(100 * 10**9)
    assert advice.method == "lora"
    assert advice.settings == {**GIVEN, "method": "lora"}
    assert advice.reasons


def test_the_rows_of_a_step_are_kept_when_the_batch_shrinks():
    advice = advise(WEIGHTS + 5 * 1024 * PER_TOKEN)
    assert advice.method == "lora"
    assert advice.settings["batch_size"] * advice.settings["gradient_accumulation"] == 8
    assert advice.workload.batch_size == 4
    assert not advice.workload.gradient_checkpointing


def test_four_bits_only_where_sixteen_do_not_fit():
    advice = advise(WEIGHTS)
    assert advice.method == "qlora"
    assert any(rule.name == "qlora-needed" for rule in advice.reasons)


def test_quality_asks_for_dora_and_says_that_the_evidence_is_mixed():
    advice = advise(100 * 10**9, goal="quality")
    assert advice.method == "dora"
    assert any(rule.evidence == "mixed" for rule in advice.reasons)
    assert advise(WEIGHTS, goal="quality").method == "qdora"


def test_only_methods_asked_about_are_recommended():
    assert advise(100 * 10**9, methods=("full",)).method == "full"
    assert advise(WEIGHTS, methods=("lora",)).method is None


def test_what_is_recommended_fits_with_its_error_unless_it_says_that_it_does_not():
    for memory in range(3 * 10**8, 12 * 10**9, 3 * 10**8):
        for goal in ORDER:
            advice = advise(memory, goal=goal)
            if advice.method is not None:
                assert advice.estimate.peak_bytes <= memory
                fits = advice.estimate.peak_bytes * (1 + advice.estimate.error) <= memory
                assert advice.is_tight is not fits


def test_a_run_that_is_only_tight_is_recommended_and_said_to_be():
    """Rather than that nothing fits where a row of the table does."""
    least = Workload(batch_size=1, max_length=16, r=8, gradient_checkpointing=True, activation_offloading=True)
    memory = toy_estimate("lora", least).peak_bytes
    advice = advise(memory, methods=("lora",), workload=least)
    assert (advice.method, advice.is_tight, advice.missing_bytes) == ("lora", True, 0)
    assert advice.to_json()["tight"] is True
    assert advise(memory - 1, methods=("lora",), workload=least).method is None


def test_what_fits_with_its_error_comes_before_what_is_gentler_and_tight():
    memory = toy_estimate("lora", WORK).peak_bytes
    advice = advise(memory, methods=("lora",))
    assert not advice.is_tight
    assert advice.workload.batch_size < WORK.batch_size


def test_where_nothing_fits_the_lack_is_that_of_the_smallest_run():
    advice = advise(10**8)
    assert advice.method is None
    assert advice.missing_bytes == advice.estimate.peak_bytes - 10**8 > 0


def test_room_is_used_for_larger_micro_batches():
    advice = advise(100 * 10**9, workload=Workload(batch_size=1, max_length=1024, r=16), accumulation=8)
    assert (advice.settings["batch_size"], advice.settings["gradient_accumulation"]) == (8, 1)
    names = {rule.name for rule in advice.reasons}
    assert "larger-batches" in names
    assert "accumulation" not in names


def test_smaller_micro_batches_are_explained_as_such():
    names = {rule.name for rule in advise(WEIGHTS + 5 * 1024 * PER_TOKEN).reasons}
    assert "accumulation" in names
    assert "larger-batches" not in names


@pytest.mark.parametrize(("optimizer", "rule"), [("paged_adamw_8bit", "paged"), ("adamw_offload", "hosted")])
def test_each_optimizer_that_saves_memory_has_its_own_reason(optimizer, rule):
    situation = Situation("full", "speed", {}, {"optimizer": optimizer}, frozenset({"optimizer"}))
    assert {found.name for found in RULES if found.when(situation)} & {"paged", "hosted"} == {rule}


def test_a_time_that_is_not_counted_is_no_zero():
    steps = [step for step in possible_steps("full", WORK, 1) if step.settings.get("optimizer") == "adamw_offload"]
    change = advisor(10**9).price(steps, "full", WORK)
    assert change.time_factor == 1
    assert not change.is_timed
    assert "not counted" in change.time_words
    assert "%" not in change.time_words


def test_the_cheapest_changes_fit_and_stand_in_the_order_of_their_cost():
    for memory in (9 * 10**9, 5 * 10**9, 3 * 10**9, 13 * 10**8):
        changes = advisor(memory).cheapest("lora", WORK, 1)
        assert changes
        assert all(change.verdict == "fits" for change in changes)
        assert [change.costs for change in changes] == sorted(change.costs for change in changes)
        for cheap, dear in itertools.pairwise(changes):
            assert cheap.costs < dear.costs or cheap.time_factor <= dear.time_factor


def test_one_change_is_enough_where_one_is():
    first = advisor(6 * 10**9).cheapest("lora", WORK, 1)[0]
    assert first.settings == {"batch_size": 4, "gradient_accumulation": 2}


def test_prices_are_those_of_the_estimates():
    for change in advisor(10**9).singles("lora", WORK, 1):
        before, after = toy_estimate("lora", WORK), toy_estimate(change.method, change.workload)
        assert change.saved_bytes == before.peak_bytes - after.peak_bytes > 0


def test_every_change_is_made_of_options_that_train_has():
    for method in PLANNED:
        for step in possible_steps(method, WORK, 1):
            TrainSettings.model_validate({"model": "m", "data": "d", "output": "o", **step.settings})


def test_every_rule_has_a_condition_a_reason_and_a_source():
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.scenario
        assert rule.reason
        assert rule.source
        assert rule.evidence in ("published", "mixed", "computed", "tried")
        if rule.evidence == "published":
            assert re.search(r"arXiv \d{4}\.\d{5}", rule.source), rule.name


def test_claims_of_dora_s_quality_are_marked_as_mixed():
    for rule in RULES:
        if rule.name.startswith(("dora", "qdora")):
            assert rule.evidence == "mixed"


@pytest.mark.parametrize("method", PLANNED)
@pytest.mark.parametrize("goal", sorted(ORDER))
def test_some_rule_explains_every_recommendation(method, goal):
    narrow = method in ("qlora", "qdora")
    fits = {"lora": not narrow, "dora": not narrow}
    situation = Situation(method, goal, fits, {"r": 16, "target_modules": "all-linear"}, frozenset())
    assert any(rule.when(situation) for rule in RULES)


def test_a_mixture_is_not_told_that_all_linear_layers_are_all():
    settings = {"r": 16, "target_modules": "all-linear"}
    for method in ("lora", "qlora", "dora", "qdora"):
        situation = Situation(method, "speed", {"lora": False}, settings, frozenset(), is_mixture=True)
        names = {rule.name for rule in RULES if rule.when(situation)}
        assert "experts-left-out" in names
        assert "qlora-all-linear" not in names
    with_experts = settings | {"target_parameters": ("mlp.experts.down_proj",)}
    assert not Situation("qlora", "speed", {}, with_experts, frozenset(), is_mixture=True).leaves_experts
    dense = Situation("qlora", "speed", {"lora": False}, settings, frozenset())
    names = {rule.name for rule in RULES if rule.when(dense)}
    assert "qlora-all-linear" in names
    assert "experts-left-out" not in names


def test_no_reason_calls_the_base_16_bit():
    """On a CPU it has 32."""
    assert not any("16-bit base" in rule.reason for rule in RULES)


def test_taking_back_no_fast_is_offered_where_it_was_given():
    def estimate(method, workload):
        found = toy_estimate(method, workload)
        return found if workload.fast else dataclasses.replace(found, peak_bytes=2 * found.peak_bytes)

    slow = dataclasses.replace(WORK, fast=False)
    asked = Advisor(estimate, seconds, 10 * 10**9, asked_slow=True)
    assert asked.cheapest("lora", slow, 1)[0].steps == (FAST,)
    assert (FAST,) in [change.steps for change in asked.singles("lora", slow, 1)]
    # An Apple GPU takes PyTorch's own step whatever was asked.
    other = Advisor(estimate, seconds, 10 * 10**9)
    assert not any("fast" in change.settings for change in other.cheapest("lora", slow, 1))
    TrainSettings.model_validate({"model": "m", "data": "d", "output": "o", **FAST.settings})


def test_servers_are_told_of_every_setting_that_they_refuse_or_ignore():
    whole, scaled = ({"modules_to_save": ("lm_head",)}, {"use_rslora": True})
    places = [advise(100 * 10**9, workload=dataclasses.replace(WORK, **own)).serving for own in (whole, scaled)]
    assert "no server takes `modules_to_save` beside an adapter" in places[0]
    assert any("ignores rsLoRA's scale" in place for place in places[1])
