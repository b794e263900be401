"""Timing this machine: on a model so small that the figures mean nothing, but are remembered and found."""

from __future__ import annotations

import json

import pytest

from rankwise.errors import RankwiseWarning
from rankwise.planning import Workload, calibration, fake_model, step
from rankwise.planning.calibration import SCHEMA, cache_folder, calibrate, measured_pace
from rankwise.planning.hardware import cpu_hardware

TINY = {"hidden_size": 64, "intermediate_size": 128, "rows": (1, 2), "tokens": 16}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration.platform, "system", lambda: "Linux")
    monkeypatch.setattr(calibration, "SHAPES", {"cpu": TINY, "cuda": TINY})


def test_each_method_is_timed_remembered_and_found():
    hardware, said = cpu_hardware(), []
    methods = ("lora", "qdora", "full")
    results = calibrate(hardware, methods, "float32", said.append)
    assert set(results) == set(methods)
    assert len(said) == 3
    pace = measured_pace(hardware, "qdora", "float32")
    assert pace is not None
    assert pace.measured
    assert pace.flops_per_second == results["qdora"]["flops_per_second"] > 0
    assert measured_pace(hardware, "dora", "float32") is None
    assert measured_pace(hardware, "lora", "bfloat16") is None


def test_a_later_measurement_adds_to_the_earlier():
    hardware = cpu_hardware()
    calibrate(hardware, ("lora",), "float32", lambda _: None)
    calibrate(hardware, ("dora",), "float32", lambda _: None)
    assert measured_pace(hardware, "lora", "float32") is not None
    assert measured_pace(hardware, "dora", "float32") is not None


def test_the_file_lies_where_caches_lie(tmp_path):
    calibrate(cpu_hardware(), ("lora",), "float32", lambda _: None)
    assert cache_folder() == tmp_path / "rankwise"
    assert json.loads((tmp_path / "rankwise" / "machine.json").read_text())["schema"] == SCHEMA


def test_what_is_timed_is_the_step_of_the_trainer(monkeypatch):
    """Fused parts and loss included, so that the pace is the one that ``rankwise train`` reaches."""
    made = []
    real = fake_model.optimize_for_training
    monkeypatch.setattr(fake_model, "optimize_for_training", lambda model: made.append(real(model)) or made[-1])
    calibrate(cpu_hardware(), ("lora",), "float32", lambda _: None)
    assert all(done.fused_loss and done.shared_inputs for done in made)
    assert len(made) == len(TINY["rows"])


def test_each_batch_size_is_timed_on_the_small_model(monkeypatch):
    made = []
    real = step.make_batch
    monkeypatch.setattr(step, "make_batch", lambda work, *place, **how: made.append(work) or real(work, *place, **how))
    calibrate(cpu_hardware(), ("lora",), "float32", lambda _: None)
    assert [(work.batch_size, work.max_length, work.dtype) for work in made] == [(1, 16, "float32"), (2, 16, "float32")]
    workload = Workload(batch_size=1, max_length=16, device_type="cpu", dtype="float32")
    _, facts, estimate = calibration._prepared("lora", workload, "cpu", TINY)
    V, h, f = calibration.VOCABULARY, TINY["hidden_size"], TINY["intermediate_size"]
    assert (facts.layers, facts.width, facts.vocabulary) == (calibration.LAYERS, h, V)
    assert estimate.total_parameters == 2 * V * h + facts.layers * (4 * h * h + 3 * f * h + 2 * h) + h


def test_timings_of_older_steps_are_not_used(tmp_path):
    hardware = cpu_hardware()
    calibrate(hardware, ("lora",), "float32", lambda _: None)
    path = tmp_path / "rankwise" / "machine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": SCHEMA - 1}))
    assert measured_pace(hardware, "lora", "float32") is None


@pytest.mark.parametrize("content", ["{", "[]", f'{{"schema": {SCHEMA}}}', f'{{"schema": {SCHEMA}, "machines": 3}}'])
def test_a_damaged_file_is_said_and_passed_over(tmp_path, content):
    (tmp_path / "rankwise").mkdir()
    (tmp_path / "rankwise" / "machine.json").write_text(content)
    with pytest.warns(RankwiseWarning, match="RW144"):
        assert measured_pace(cpu_hardware(), "lora", "float32") is None


@pytest.mark.parametrize("rate", [0, -1.0, "fast", [1.0], None])
def test_a_pace_that_is_none_is_said_and_passed_over(rate, tmp_path):
    calibrate(hardware := cpu_hardware(), ("lora",), "float32", lambda _: None)
    path = tmp_path / "rankwise" / "machine.json"
    content = json.loads(path.read_text())
    for machine in content["machines"].values():
        machine["methods"]["lora"]["flops_per_second"] = rate
    path.write_text(json.dumps(content))
    with pytest.warns(RankwiseWarning, match="RW144"):
        assert measured_pace(hardware, "lora", "float32") is None


def test_without_a_file_nothing_is_known_and_nothing_said(recwarn):
    assert measured_pace(cpu_hardware(), "lora", "float32") is None
    assert not recwarn.list
