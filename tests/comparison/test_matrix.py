"""Which runs there are, and how the learning rate is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.comparison.conclusion import command_line
from rankwise.comparison.settings import CompareSettings, check_compare, seconds_of, shared_training
from rankwise.comparison.stages import Cell, Plan, cell_settings, choose_rate, planned_runs
from rankwise.config import RetainOptions, TrainSettings
from rankwise.errors import ConfigError
from rankwise.options import read_settings


def settings(**changes: object) -> CompareSettings:
    given = {"model": "demo", "data": "rows.jsonl", "output": "out", **changes}
    return read_settings(CompareSettings, None, given)


def test_the_chosen_rate_is_the_best_and_its_run_is_not_repeated():
    plan = Plan(output=Path(), methods=("lora",), rates={"lora": (1e-4, 2e-4, 5e-4)}, seeds=3)
    assert len({*plan.search("lora"), *plan.final("lora", 2e-4)}) == planned_runs(1, 3, 3) == 5
    assert Plan(output=Path(), methods=("lora",), rates={"lora": (1e-4,)}, seeds=3).search("lora") == []
    assert planned_runs(4, 1, 1) == 4


def test_a_best_rate_at_the_edge_is_flagged():
    assert choose_rate({1e-4: 2.0, 2e-4: 1.5, 5e-4: 1.7}) == (2e-4, False)
    assert choose_rate({1e-4: 2.0, 2e-4: 1.5, 5e-4: 1.2}) == (5e-4, True)
    assert choose_rate({1e-4: 1.0, 2e-4: 1.5}) == (1e-4, True)
    # Beyond it a run diverged, so the optimum lies inside.
    assert choose_rate({1e-4: 2.0, 2e-4: 1.5, 5e-4: None}) == (2e-4, False)
    assert choose_rate({1e-4: None}) == (None, False)


def test_every_option_of_train_is_shared_or_has_its_counterpart():
    own = {"model", "data", "eval_data", "output", "method", "learning_rate", "budget", "seed"}
    own |= set(RetainOptions.model_fields)
    without = {"cache", "mmap", "report_to", "skip_bad_rows", "devices", "strategy"}
    without |= {"resume", "overwrite", "new_tokens", "adapter", "reward"}
    without |= {"reward_weights", "num_generations", "temperature", "max_completion_length"}
    shared = shared_training(settings())
    assert set(shared) == set(TrainSettings.model_fields) - own - without
    defaults = {name: TrainSettings.model_fields[name].default for name in shared}
    assert all(shared[name] == defaults[name] for name in ("r", "batch_size", "optimizer", "max_steps"))


def test_a_run_gets_the_options_that_its_method_uses():
    shared = shared_training(settings(r=4, quant_type="fp4", target_modules="q_proj"))

    def options(method: str) -> set[str]:
        return set(cell_settings(Cell(method, 1e-4, 0), Path("out"), shared, {}))

    assert {"r", "target_modules"} <= options("lora")
    assert "quant_type" not in options("lora")
    assert {"r", "target_modules", "quant_type"} <= options("qdora")
    assert not {"r", "target_modules", "quant_type"} & options("full")
    assert options("prefix") & {"r", "target_modules", "quant_type"} == {"r"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"methods": "lora,lore"}, "RW165"),
        ({"methods": ""}, "RW165"),
        ({"methods": "lora,dora,lora"}, "RW167"),
        ({"learning_rates": "1e-4,0.0001"}, "RW167"),
        ({"metric": "e2e.BLEU"}, "RW167"),
        ({"budget": 1, "learning_rates": "1e-4"}, "RW167"),
    ],
)
def test_settings_that_cannot_be(changes, code):
    with pytest.raises(ConfigError) as caught:
        check_compare(settings(**changes))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"objective": "dpo"}, "--objective dpo"),
        ({"objective": "dpo", "metric": "eval_loss"}, "--objective dpo --metric eval_loss"),
    ],
)
def test_the_command_repeats_the_comparison(changes, words):
    usual = "rankwise compare --model demo --data rows.jsonl --output out"
    assert sorted(command_line(settings(**changes)).split()) == sorted(f"{usual} {words}".split())


def test_a_variant_is_a_method_of_its_own():
    shared = shared_training(settings(loraplus_ratio=4, use_rslora=False))

    def given(method: str) -> dict[str, object]:
        return cell_settings(Cell(method, 1e-4, 0), Path("out"), shared, {})

    plain = given("lora")
    assert (plain["method"], plain["init"], plain["loraplus_ratio"]) == ("lora", "default", 4)
    chosen = given("qdora+pissa+plus+rslora")
    assert (chosen["method"], chosen["init"], chosen["loraplus_ratio"]) == ("qdora", "pissa", 16)
    assert chosen["use_rslora"] is True
    assert given("lora+int8")["products"] == "int8"
    small = given("dora+r4+qv")
    assert (small["r"], small["lora_alpha"], small["target_modules"]) == (4, 8, ["q_proj", "v_proj"])
    assert "init" not in given("full")
    TrainSettings.model_validate({**chosen, "model": "demo", "data": "rows.jsonl"})
    assert len({Cell(name, 1e-4, 0).id for name in ("lora", "lora+pissa", "lora+plus", "qlora+pissa")}) == 4
    check_compare(settings(methods=("lora", "lora+pissa", "dora", "qlora+loftq", "lora+plus", "lora+pissa+rslora")))


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({}, 0.25),
        ({"learning_rates": "1e-4"}, None),
        ({"objective": "dpo"}, None),
        ({"budget": 1}, 1.0),
        ({"time": None}, None),
    ],
)
def test_a_time_implies_short_runs_where_rates_are_searched_on_demonstrations(changes, budget):
    found = settings(**{"time": "1h30m", **changes})
    assert found.budget == budget
    assert command_line(found).count("--budget") == (changes == {"budget": 1})
    assert seconds_of("1h30m") == 5400


@pytest.mark.parametrize("time", ["40", "m", "", "0m", "1d", 40])
def test_a_time_without_a_unit_is_refused(time):
    with pytest.raises(ConfigError, match=r"RW103.*40m, 8h or 1h30m"):
        settings(time=time)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("lora+pisa", "'pisa' is not a variant"),
        ("lara+pissa", "'lara' is not a method"),
        ("lora+pissa+loftq", "set the same"),
        ("lora+r4+r8", "set the same"),
        ("lora+r0", "'r0' is not a variant"),
        ("full+plus", "full has no use for plus"),
        ("full+int8", "full has no use for int8"),
        ("prefix+rslora", "prefix has no use for rslora"),
        ("dora+loftq", "dora has no use for loftq"),
    ],
)
def test_variants_that_cannot_be_are_refused(method, said):
    with pytest.raises(ConfigError, match="RW165") as error:
        check_compare(settings(methods=("lora", method)))
    assert said in str(error.value)
