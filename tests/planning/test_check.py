"""Predicted against measured: what is compared with what."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rankwise.acceleration import MovedOnce
from rankwise.constants import IGNORED
from rankwise.errors import ConfigError
from rankwise.planning import MemoryEstimate, Workload, check
from rankwise.planning.check import Check, check_method, comparable
from rankwise.planning.fake_model import prepare
from rankwise.planning.measure import Measurement, _no_answer, _offloading, _warm_up
from rankwise.planning.step import make_batch
from tiny_models import tiny_llama


def test_the_error_is_relative_to_what_was_measured():
    assert Check("lora", "cpu", 110, 100, False, (1.0,)).error == pytest.approx(0.1)


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
    estimate = MemoryEstimate("lora", 1000, {}, 0, 0, 0.05, False)
    estimate = dataclasses.replace(estimate, outside_bytes=300)
    assert comparable(estimate, "cuda") == 700
    assert comparable(estimate, "cpu") == 1000


def test_both_sides_are_asked_about_the_same_step(monkeypatch):
    asked = []

    def measure(model, method, workload, **place):
        asked.append((model, method, workload, place))
        return Measurement(90, 5, (0.3, 0.1, 0.2), "cpu")

    def estimate(model, method, workload, *, exact, **place):
        asked.append((model, method, workload, place))
        return MemoryEstimate(method, 100, {}, 0, 0, 0.05, exact)

    monkeypatch.setattr(check, "measure", measure)
    monkeypatch.setattr(check, "estimate", estimate)
    found = check_method("m", "dora", Workload(device_type="cpu"), 100, exact=True)
    assert asked[0] == asked[1]
    assert (found.predicted_bytes, found.measured_bytes, found.exact) == (100, 90, True)


@pytest.mark.parametrize(("peak", "parameters"), [(101, 0), (20, 51)])
def test_steps_that_cannot_fit_are_not_begun(monkeypatch, peak, parameters):
    """51 weights in 16 bits are there before they are quantized."""
    estimate = MemoryEstimate("qlora", peak, {}, 0, parameters, 0.05, False)
    monkeypatch.setattr(check, "estimate", lambda *order, **more: estimate)
    monkeypatch.setattr(check, "measure", lambda *order, **more: pytest.fail("started all the same"))
    with pytest.raises(ConfigError, match="RW134"):
        check_method("m", "qlora", Workload(device_type="cpu"), 100)


@pytest.mark.parametrize("is_asked", [False, True])
def test_measured_steps_offload_activations_as_the_trainer_does(monkeypatch, is_asked):
    theirs = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    monkeypatch.setattr("trl.models.activation_offloading.get_act_offloading_ctx_manager", lambda model: theirs)
    context = _offloading(nn.Linear(1, 1), Workload(device_type="cuda", activation_offloading=is_asked))
    assert (context is theirs) is is_asked
    assert isinstance(getattr(theirs.pack_hook, "__self__", None), MovedOnce) is is_asked


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
