"""Predicted against measured: what is compared with what."""

from __future__ import annotations

import dataclasses

import pytest

from rankwise.planning import MemoryEstimate, Workload, check
from rankwise.planning.check import Check, check_method, comparable
from rankwise.planning.measure import Measurement


def test_the_error_is_relative_to_what_was_measured():
    assert Check("lora", "cpu", 110, 100, False, (1.0,)).error == pytest.approx(0.1)


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
    found = check_method("m", "dora", Workload(device_type="cpu"), exact=True)
    assert asked[0] == asked[1]
    assert (found.predicted_bytes, found.measured_bytes, found.exact) == (100, 90, True)
