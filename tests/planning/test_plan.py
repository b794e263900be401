"""The plan of several methods, and the guard that asks it before a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from planning_models import config_of

from rankwise.cli.plan_view import heading
from rankwise.config import TrainSettings
from rankwise.errors import ConfigError, RankwiseWarning, RunError
from rankwise.options import read_settings
from rankwise.planning import guard, hardware, speed
from rankwise.planning.guard import MemoryGuard
from rankwise.planning.hardware import cpu_hardware
from rankwise.planning.plan import make_plan
from rankwise.planning.workload import PlanSettings
from rankwise.training.batches import MicroBatch

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


@pytest.mark.parametrize("method", ["", "lore", "lora,lore"])
def test_a_method_that_does_not_exist_is_refused(method: str, model: Path) -> None:
    with pytest.raises(ConfigError, match="RW130"):
        make_plan(settings(model, method=method))


def test_processes_on_this_processor_share_its_memory_and_its_cores(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = dataclasses.replace(cpu_hardware(), memory_bytes=8 * 10**9, cores=4)
    monkeypatch.setattr(hardware, "this_machine", lambda: machine)
    monkeypatch.setattr(speed, "measured_flops", lambda *_: 1e11)
    one, four = (make_plan(settings(model, method="lora", devices=count)) for count in (1, 4))
    assert (one.hardware.memory_bytes, four.hardware.memory_bytes) == (8 * 10**9, 2 * 10**9)
    assert four.rows[0].tokens_per_second == pytest.approx(one.rows[0].tokens_per_second)
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
    guarding(model).before_loading()
    memory(10**6)
    with pytest.raises(RunError, match=r"RW562: this run cannot fit: even one row of 16 tokens takes .* 1\.00 MB"):
        guarding(model).before_loading()
    with pytest.warns(RankwiseWarning, match="RW563: .*even one row of 16 tokens .*--ignore-plan"):
        guarding(model, ignore=True).before_loading()


def test_a_run_may_need_less_memory_than_its_base(model: Path, memory: Any) -> None:
    memory(10**10)
    guarded = guarding(model)
    guarded.before_loading()
    batch = MicroBatch(1, 16, 1.0)
    guarded.before_training(batch, None, files_of(0))
    assert guarded.predicted is not None
    mapped = guarded.predicted.breakdown["weights"]
    memory(guarded.predicted.peak_bytes - 1)
    told: list[str] = []
    guarded = guarding(model, say=told.append)
    guarded.before_loading()
    guarded.before_training(batch, None, files_of(mapped))
    assert "from disk" in told[-2]
    assert "read again from the disk in each step: 0.0 s at 1 GB/s (assumed)" in told[-1]
    with pytest.raises(RunError, match="RW562"):
        guarded.before_training(batch, None, files_of(0))


def test_processes_share_the_memory(model: Path, memory: Any) -> None:
    memory(10**9)
    guarding(model).before_loading()
    with pytest.raises(RunError, match="RW562.* for each process"):
        guarding(model, sharers=1000).before_loading()


def test_weights_in_mapped_files_are_not_taken_from_what_the_process_has(model: Path, memory: Any) -> None:
    """The meter counts them beside the process's own memory, and so does the prediction."""
    memory(10**10)
    batch, mapped, others = MicroBatch(1, 16, 1.0), 10**6, 10**9
    found = []
    for own, of_files in ((others + mapped, 0), (others, mapped)):
        guarded = guarding(model)
        guarded.before_loading()
        guarded.own_memory = lambda own=own: own
        found.append(guarded.before_training(batch, None, files_of(of_files)))
    assert found[0] == found[1]
