"""Real steps beside the plan's, and the speed of this machine, which is remembered."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rankwise import disk
from rankwise.constants import IGNORED
from rankwise.disk import cache_folder
from rankwise.errors import ConfigError, RankwiseWarning
from rankwise.planning import MemoryEstimate, Workload, real_steps
from rankwise.planning.hardware import cpu_hardware
from rankwise.planning.real_steps import (
    SCHEMA,
    Check,
    Measurement,
    _no_answer,
    _warm_up,
    calibrate,
    check_method,
    comparable,
    measured_pace,
)
from rankwise.planning.step import make_batch, prepare
from tiny_models import tiny_llama


def test_the_error_is_relative_to_what_was_measured():
    assert Check("lora", "cpu", 110, 100, (1.0,)).error == pytest.approx(0.1)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("settings", [{}, {"trained_share": 0.3}, {"batch_size": 1}, {"sides": 2}])
def test_a_batch_scores_as_many_tokens_as_are_planned(settings, flat):
    """By the model's own loss, which takes the labels one place on, and at the positions of a plain one."""
    workload = Workload(**{"batch_size": 3, "max_length": 20, **settings})
    batch = make_batch(workload, flat=flat)
    assert int((batch.labels[:, 1:] != IGNORED).sum()) == workload.trained_tokens
    wanted = batch.labels[:, batch.positions + 1]
    assert wanted.numel() == workload.trained_tokens
    assert (wanted != IGNORED).all()


def test_a_frozen_model_trains_whole_in_full_fine_tuning():
    model = tiny_llama().requires_grad_(False)
    prepare(model, "full", Workload(device_type="cpu", dtype="float32"))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_libraries_are_warm_before_anything_is_measured(dtype):
    _warm_up("cpu", Workload(device_type="cpu", dtype=dtype))


def test_on_cuda_the_allocator_does_not_see_the_context():
    estimate = MemoryEstimate("lora", 1000, {}, 0, 0, 0.05)
    estimate = dataclasses.replace(estimate, outside_bytes=300)
    assert comparable(estimate, "cuda") == 700
    assert comparable(estimate, "cpu") == 1000


def test_both_sides_are_asked_about_the_same_step(monkeypatch):
    asked = []

    def measure(model, method, workload, **place):
        asked.append((model, method, workload, place))
        return Measurement(90, 5, (0.3, 0.1, 0.2), "cpu", 1, 2)

    def estimate(model, method, workload, **place):
        asked.append((model, method, workload, place))
        return MemoryEstimate(method, 100, {}, 0, 0, 0.05)

    monkeypatch.setattr(real_steps, "measure", measure)
    monkeypatch.setattr(real_steps, "estimate", estimate)
    found = check_method("m", "dora", Workload(device_type="cpu"), 100)
    assert asked[0] == asked[1]
    assert (found.predicted_bytes, found.measured_bytes) == (100, 90)


@pytest.mark.parametrize(("peak", "parameters"), [(101, 0), (20, 51)])
def test_steps_that_cannot_fit_are_not_begun(monkeypatch, peak, parameters):
    """51 weights in 16 bits are there before they are quantized."""
    estimate = MemoryEstimate("qlora", peak, {}, 0, parameters, 0.05)
    monkeypatch.setattr(real_steps, "estimate", lambda *order, **more: estimate)
    monkeypatch.setattr(real_steps, "measure", lambda *order, **more: pytest.fail("started all the same"))
    with pytest.raises(ConfigError, match="RW134"):
        check_method("m", "qlora", Workload(device_type="cpu"), 100)


@pytest.mark.parametrize(
    ("code", "stderr", "starved"),
    [
        (-9, "", True),
        (1, "torch.OutOfMemoryError: CUDA out of memory", True),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", True),
        (1, "rankwise.errors.ConfigError: RW132: steps with the optimizer 'x' cannot be measured here.", False),
    ],
)
def test_smaller_steps_are_advised_where_memory_ran_out(code, stderr, starved):
    assert ("smaller" in str(_no_answer(code, stderr))) is starved


TINY = {"hidden_size": 64, "intermediate_size": 128, "rows": (1, 2), "tokens": 16}


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(disk.platform, "system", lambda: "Linux")
    monkeypatch.setattr(real_steps, "SHAPES", {"cpu": TINY, "cuda": TINY})
    measured = Measurement(90, 5, (0.3, 0.1, 0.2), "cpu", 100, 10_000)
    monkeypatch.setattr(real_steps, "measure", lambda *_: measured)


def test_each_method_is_timed_remembered_and_found(own_cache):
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


def test_a_later_measurement_adds_to_the_earlier(own_cache):
    hardware = cpu_hardware()
    calibrate(hardware, ("lora",), "float32", lambda _: None)
    calibrate(hardware, ("dora",), "float32", lambda _: None)
    assert measured_pace(hardware, "lora", "float32") is not None
    assert measured_pace(hardware, "dora", "float32") is not None


def test_the_file_lies_where_caches_lie(own_cache, tmp_path):
    calibrate(cpu_hardware(), ("lora",), "float32", lambda _: None)
    assert cache_folder() == tmp_path / "rankwise"
    assert json.loads((tmp_path / "rankwise" / "machine.json").read_text())["schema"] == SCHEMA


def test_timings_of_older_steps_are_not_used(own_cache, tmp_path):
    hardware = cpu_hardware()
    calibrate(hardware, ("lora",), "float32", lambda _: None)
    path = tmp_path / "rankwise" / "machine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": SCHEMA - 1}))
    assert measured_pace(hardware, "lora", "float32") is None


@pytest.mark.parametrize("content", ["{", "[]", f'{{"schema": {SCHEMA}}}', f'{{"schema": {SCHEMA}, "machines": 3}}'])
def test_a_damaged_file_is_said_and_passed_over(own_cache, tmp_path, content):
    (tmp_path / "rankwise").mkdir()
    (tmp_path / "rankwise" / "machine.json").write_text(content)
    with pytest.warns(RankwiseWarning, match="RW144"):
        assert measured_pace(cpu_hardware(), "lora", "float32") is None


@pytest.mark.parametrize("rate", [0, -1.0, "fast", [1.0], None])
def test_a_pace_that_is_none_is_said_and_passed_over(own_cache, rate, tmp_path):
    calibrate(hardware := cpu_hardware(), ("lora",), "float32", lambda _: None)
    path = tmp_path / "rankwise" / "machine.json"
    content = json.loads(path.read_text())
    for machine in content["machines"].values():
        machine["methods"]["lora"]["flops_per_second"] = rate
    path.write_text(json.dumps(content))
    with pytest.warns(RankwiseWarning, match="RW144"):
        assert measured_pace(hardware, "lora", "float32") is None


def test_without_a_file_nothing_is_known_and_nothing_said(own_cache, recwarn):
    assert measured_pace(cpu_hardware(), "lora", "float32") is None
    assert not recwarn.list
