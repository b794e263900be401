"""Real steps beside the plan's."""

from __future__ import annotations

import json

import pytest
from planning_models import config_of

from rankwise.errors import ConfigError
from rankwise.planning import MemoryEstimate, Workload, real_steps
from rankwise.planning.real_steps import Measurement, check_method, comparable
from rankwise.planning.step import batch_of, objective_of
from rankwise.training.batches import KEY
from tiny_models import tiny_llama


@pytest.mark.parametrize("layout", ["padded", "flat", "shared"])
@pytest.mark.parametrize("settings", [{}, {"trained_share": 0.3}, {"batch_size": 1}, {"objective": "dpo"}])
def test_a_batch_scores_as_many_tokens_as_are_planned(settings, layout):
    """But for the token of padding in the last of several rows."""
    workload = Workload(**{"batch_size": 3, "max_length": 20, **settings})
    batch = batch_of(objective_of(tiny_llama(), workload, layout), workload, layout)
    scored = batch["answers"].places if "answers" in batch else batch[KEY].scored
    left_out = workload.trained_tokens - len(scored)
    sides = workload.sequences // workload.batch_size
    assert left_out == (0 if layout != "padded" or workload.batch_size == 1 or workload.trained_share < 1 else sides)


def test_steps_alone_do_not_show_an_idle_process():
    assert (
        comparable(
            MemoryEstimate(
                method="lora",
                peak_bytes=1000,
                breakdown={},
                trainable_parameters=0,
                total_parameters=0,
                error=0.05,
                outside_bytes=300,
            )
        )
        == 700
    )


@pytest.mark.parametrize("fast", [True, False])
def test_what_a_small_step_takes_besides_tensors_is_small(fast, tmp_path):
    """Three steps of small models took 16 to 20 MB more than their tensors, and 4 to 10 with PyTorch's operators."""
    sizes = {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama", **sizes, num_key_value_heads=2)))
    found = real_steps.estimate(tmp_path, "lora", Workload(batch_size=1, max_length=64, device_type="cpu", fast=fast))
    tensors = found.training_bytes - found.breakdown["overhead"]
    assert comparable(found) - tensors < (25e6 if fast else 10e6)


def test_both_sides_are_asked_about_the_same_step(monkeypatch):
    asked = []

    def measure(model, method, workload, **place):
        asked.append((model, method, workload, place))
        return Measurement(90, [0.3, 0.1, 0.2])

    def estimate(model, method, workload, **place):
        asked.append((model, method, workload, place))
        return MemoryEstimate(
            method=method, peak_bytes=100, breakdown={}, trainable_parameters=0, total_parameters=0, error=0.05
        )

    monkeypatch.setattr(real_steps, "measure", measure)
    monkeypatch.setattr(real_steps, "estimate", estimate)
    found = check_method("m", "dora", Workload(device_type="cpu"), 100)
    assert asked[0] == asked[1]
    assert (found.predicted_bytes, found.measured_bytes) == (100, 90)


@pytest.mark.parametrize(("peak", "parameters"), [(101, 0), (20, 51)])
def test_steps_that_cannot_fit_are_not_begun(monkeypatch, peak, parameters):
    """51 weights in 16 bits are there before they are quantized."""
    estimate = MemoryEstimate(
        method="qlora", peak_bytes=peak, breakdown={}, trainable_parameters=0, total_parameters=parameters, error=0.05
    )
    monkeypatch.setattr(real_steps, "estimate", lambda *order, **more: estimate)
    monkeypatch.setattr(real_steps, "measure", lambda *order, **more: pytest.fail("started all the same"))
    with pytest.raises(ConfigError, match="RW134"):
        check_method("m", "qlora", Workload(device_type="cpu"), 100)
