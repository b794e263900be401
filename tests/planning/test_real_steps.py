"""Real steps beside the plan's."""

from __future__ import annotations

import dataclasses

import pytest

from rankwise.constants import IGNORED
from rankwise.errors import ConfigError
from rankwise.planning import MemoryEstimate, Workload, real_steps
from rankwise.planning.real_steps import (
    Measurement,
    check_method,
    comparable,
)
from rankwise.planning.step import make_batch


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("settings", [{}, {"trained_share": 0.3}, {"batch_size": 1}, {"objective": "dpo"}])
def test_a_batch_scores_as_many_tokens_as_are_planned(settings, flat):
    """By the model's own loss, which takes the labels one place on, and at the positions of a plain one."""
    workload = Workload(**{"batch_size": 3, "max_length": 20, **settings})
    batch = make_batch(workload, flat=flat)
    assert int((batch.labels[:, 1:] != IGNORED).sum()) == workload.trained_tokens
    wanted = batch.labels[:, batch.positions + 1]
    assert wanted.numel() == workload.trained_tokens
    assert (wanted != IGNORED).all()


def test_on_cuda_the_allocator_does_not_see_the_context():
    estimate = MemoryEstimate("lora", 1000, {}, 0, 0, 0.05)
    estimate = dataclasses.replace(estimate, outside_bytes=300)
    assert comparable(estimate, "cuda") == 700
    assert comparable(estimate, "cpu") == 1000


def test_both_sides_are_asked_about_the_same_step(monkeypatch):
    asked = []

    def measure(model, method, workload, **place):
        asked.append((model, method, workload, place))
        return Measurement(90, [0.3, 0.1, 0.2])

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
