"""The plan of several methods, and the guard that asks it before a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from planning_models import config_of

from rankwise.config import TrainSettings
from rankwise.errors import ConfigError, ModelError, RankwiseWarning, RunError
from rankwise.models import fetch_model, load_skeleton
from rankwise.options import read_settings
from rankwise.planning import guard, hardware, speed
from rankwise.planning.guard import MemoryGuard
from rankwise.planning.hardware import cpu_hardware
from rankwise.planning.plan import make_plan
from rankwise.planning.workload import PlanSettings
from rankwise.training.batches import MicroBatch
from rankwise.verbs.plan_view import footnotes, heading, rounded_lines

EVERY = ("full", "lora", "qlora", "dora", "qdora")
SMALL = {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama", **SMALL, num_key_value_heads=2)))
    return tmp_path


def settings(model: Path, **given: Any) -> PlanSettings:
    return read_settings(PlanSettings, None, {"model": str(model), "max_length": 64, **given})


@pytest.mark.parametrize(
    ("given", "methods"),
    [
        ("all", EVERY),
        ("qlora,all", EVERY),
        ("dora,lora", ("lora", "dora")),
        ("full", ("full",)),
    ],
)
def test_a_plan_has_a_row_for_each_method_that_was_asked_for(given: str, methods: tuple[str, ...], model: Path) -> None:
    found = make_plan(settings(model, method=given, gpu="RTX 4090"))
    assert (found.model, found.hardware.name) == (str(model), "RTX 4090")
    assert tuple(row.estimate.method for row in found.rows) == methods
    assert not found.unplanned
    assert found.recommendation.method in methods
    assert json.loads(json.dumps(found.to_json()))["model"] == str(model)


PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "microsoft/phi-4": 14_659_507_200,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    # Without the vision tower's 416,866,032 parameters and the projector to the text model's width.
    "google/gemma-3-4b-pt": 4_300_079_472 - 416_866_032 - 1152 * 2561,
    "google/gemma-3-12b-pt": 12_187_325_040 - 416_866_032 - 1152 * 3841,
    "google/gemma-3-27b-pt": 27_432_406_640 - 416_866_032 - 1152 * 5377,
}
SHAPES = json.loads(Path(speed.__file__).with_name("shapes.json").read_text())


def test_every_built_in_shape_is_compared_with_its_published_size() -> None:
    assert {row["ids"][0] for row in SHAPES} == set(PUBLISHED)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["ids"][0])
def test_a_built_in_shape_has_the_published_number_of_parameters(shape: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shape["config"]))
    total = sum(parameter.numel() for parameter in load_skeleton(fetch_model(tmp_path, weights=False)).parameters())
    assert total == PUBLISHED[shape["ids"][0]]


@pytest.mark.parametrize("code", ["RW313", "RW314", "RW315"])
def test_where_the_hub_gives_no_config_the_built_in_shape_is_planned(code: str, monkeypatch: Any) -> None:
    """But not for a name that the hub does not know."""

    def refuse(*_: Any) -> None:
        raise ModelError(code, "not today.")

    monkeypatch.setattr("rankwise.models.source.snapshot", refuse)
    asked = read_settings(PlanSettings, None, {"model": "Qwen/Qwen3-0.6B-Base", "method": "lora", "max_length": 16})
    if code == "RW314":
        with pytest.raises(ModelError, match="RW314"):
            make_plan(asked)
        return
    found = make_plan(asked)
    assert found.rows[0].estimate.total_parameters == PUBLISHED["Qwen/Qwen3-0.6B"]
    assert ("shape", "of Qwen/Qwen3-0.6B-Base as built in: not today.") in footnotes(found, why=False)


@pytest.mark.parametrize(
    ("objective", "batch_size", "is_told"), [("sft", 16, True), ("dpo", 8, True), ("sft", 17, False), ("dpo", 9, False)]
)
def test_a_plan_says_what_weights_that_are_rounded_once_take(
    objective: str, batch_size: int, is_told: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes of at most 1,024 tokens, of which a pair of answers has those of two rows."""
    monkeypatch.setattr(speed, "measured_flops", lambda *_: 1e10)
    monkeypatch.setattr(speed, "measured_integers", lambda *_: 0.5)
    own = {"method": "lora", "objective": objective, "batch_size": batch_size, "products": "int8"}
    found = [line for _, line in rounded_lines(make_plan(settings(model, **own)))]
    assert ["which fits with lora" in line for line in found] == [True] * is_told


@pytest.mark.parametrize("method", ["", "lore", "lora,lore"])
def test_a_method_that_does_not_exist_is_refused(method: str, model: Path) -> None:
    with pytest.raises(ConfigError, match="RW130"):
        make_plan(settings(model, method=method))


def test_processes_on_this_processor_share_its_memory_and_its_cores(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = dataclasses.replace(cpu_hardware(), memory_bytes=8 * 10**9, cores=4)
    monkeypatch.setattr(hardware, "this_machine", lambda: machine)
    monkeypatch.setattr(speed, "measured_flops", lambda *_: 1e10)
    one, four = (make_plan(settings(model, method="lora", devices=count)) for count in (1, 4))
    assert (one.hardware.memory_bytes, four.hardware.memory_bytes) == (8 * 10**9, 2 * 10**9)
    # Each launches operators and steps an optimizer of its own.
    assert four.rows[0].tokens_per_second == pytest.approx(one.rows[0].tokens_per_second, rel=0.05)
    assert next(heading(four)).startswith(f"{model} on 4 processes of this machine")
    assert ": 2.00 GB each (" in next(heading(four))
    # Each has a card of its own.
    one, four = (make_plan(settings(model, method="lora", devices=count, gpu="RTX 4090")) for count in (1, 4))
    assert four.hardware == one.hardware
    assert four.rows[0].tokens_per_second == pytest.approx(4 * (one.rows[0].tokens_per_second or 0))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of_so_many_bytes(count: int) -> None:
        monkeypatch.setattr(guard, "cpu_hardware", lambda: dataclasses.replace(cpu_hardware(), memory_bytes=count))

    return of_so_many_bytes


def files_of(mapped_bytes: int) -> Any:
    return SimpleNamespace(bytes=mapped_bytes, versions={})


def guarding(model: Path, **how: Any) -> MemoryGuard:
    given = {**TrainSettings.defaults(), "model": str(model), "method": "lora", "device": "cpu"}
    return MemoryGuard(given, **{"say": lambda line: None, "own_memory": lambda: 0, "ignore": False, **how})


def test_a_run_of_which_no_row_fits_is_refused_before_its_weights_are_read(model: Path, memory: Any) -> None:
    memory(10**10)
    guarding(model).before_loading(fetch_model(str(model)))
    memory(10**6)
    with pytest.raises(RunError, match=r"RW562: this run cannot fit: even one row of 16 tokens takes .* 1\.00 MB"):
        guarding(model).before_loading(fetch_model(str(model)))
    with pytest.warns(RankwiseWarning, match="RW563: .*even one row of 16 tokens .*--ignore-plan"):
        guarding(model, ignore=True).before_loading(fetch_model(str(model)))


def test_a_run_may_need_less_memory_than_its_base(model: Path, memory: Any) -> None:
    memory(10**10)
    guarded = guarding(model, own_memory=lambda: 10**9)
    guarded.before_loading(fetch_model(str(model)))
    batch = MicroBatch(1, 16, 1.0)
    guarded.before_training(batch, None, files_of(0))
    assert guarded.predicted is not None
    mapped = guarded.predicted.breakdown["weights"]
    memory(guarded.predicted.peak_bytes - 1)
    told: list[str] = []
    guarded = guarding(model, say=told.append, own_memory=lambda: 10**9 - mapped)
    guarded.before_loading(fetch_model(str(model)))
    guarded.before_training(batch, None, files_of(mapped))
    assert "from disk" in told[-2]
    assert "read again from the disk in each step: 0.0 s at 1 GB/s (assumed)" in told[-1]
    guarded.own_memory = lambda: 10**9
    with pytest.raises(RunError, match="RW562"):
        guarded.before_training(batch, None, files_of(0))


def test_rounded_weights_are_kept_where_the_plan_has_room(model: Path, memory: Any) -> None:
    memory(10**10)
    told: list[str] = []
    guarded = guarding(model, say=told.append)
    assert not guarded.keeps_rounded(1)
    guarded.before_loading(fetch_model(str(model)))
    guarded.before_training(MicroBatch(1, 16, 1.0), None, files_of(0))
    before = guarded.predicted
    assert before is not None
    assert not guarded.keeps_rounded(10**10)
    assert guarded.predicted is before
    assert "rounded in every pass: there is no room to keep them (10.0 GB)" in told[-1]
    assert guarded.keeps_rounded(10**9)
    assert guarded.predicted.peak_bytes == before.peak_bytes + 10**9 == sum(guarded.predicted.breakdown.values())
    assert "rounded once and kept: 1.00 GB more, a peak of " in told[-1]


def test_processes_share_the_memory(model: Path, memory: Any) -> None:
    memory(10**9)
    guarding(model).before_loading(fetch_model(str(model)))
    with pytest.raises(RunError, match="RW562.* for each process"):
        guarding(model, sharers=1000).before_loading(fetch_model(str(model)))


def test_weights_in_mapped_files_are_not_taken_from_what_the_process_has(model: Path, memory: Any) -> None:
    """The meter counts them beside the process's own memory, and so does the prediction."""
    memory(10**10)
    batch, mapped, others = MicroBatch(1, 16, 1.0), 10**6, 10**9
    found = []
    for own, of_files in ((others + mapped, 0), (others, mapped)):
        guarded = guarding(model)
        guarded.before_loading(fetch_model(str(model)))
        guarded.own_memory = lambda own=own: own
        found.append(guarded.before_training(batch, None, files_of(of_files)))
    assert found[0] == found[1]


def test_a_prediction_holds_what_loading_has_left(model: Path, memory: Any) -> None:
    memory(10**10)

    def peak(own: int) -> int:
        guarded = guarding(model, own_memory=lambda: own)
        guarded.before_loading(fetch_model(str(model)))
        found = guarded.before_training(MicroBatch(1, 16, 1.0), None, files_of(0))
        assert found is not None
        return found[0]

    high, least = peak(10**9), peak(0)
    assert peak(10**9 - (high - least) + 10**7) == least + 10**7
