"""What one of several devices holds and sends."""

from __future__ import annotations

import json

import pytest
from planning_models import extended, skeleton, trace

from rankwise.planning import Workload, estimate
from rankwise.planning.memory import Traffic, traffic
from tables import long

SMALL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LARGE = SMALL | {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "head_dim": 512}


def test_a_ring_sends_almost_every_byte_once_to_gather_and_twice_to_sum():
    sizes = {"weight_bytes": 1000, "root_bytes": 200, "trained_bytes": 40}
    ddp, fsdp = Workload(devices=4, strategy="ddp"), Workload(devices=4, strategy="fsdp")
    assert traffic("lora", ddp, sizes) == Traffic(0, 60)
    # Each way through the layers gathers them; the root stays from the first to the last.
    assert traffic("lora", fsdp, sizes) == Traffic(1350, 60)
    assert traffic("full", fsdp, sizes) == Traffic(1350 + 750)
    assert traffic("lora", fsdp, sizes).of_step(3) == 3 * 1350 + 60
    assert traffic("full", Workload(), sizes) == Traffic()


def test_the_phase_is_that_in_which_a_device_holds_most():
    """Alone a step peaks where gradients and states are whole; sharded, where activations are."""

    def found(**changes):
        # RMSprop copies what trains in its step; a card's AdamW does not.
        workload = Workload(batch_size=1, max_length=128, optimizer="rmsprop", **changes)
        return trace(skeleton("llama", **LARGE), "full", workload)

    alone, shared = found(), found(devices=64, strategy="fsdp")
    assert alone.phase == "optimizer"
    assert shared.phase != "optimizer"
    assert shared.breakdown["activations"] > 0
    assert shared.breakdown["optimizer"] == pytest.approx(alone.breakdown["optimizer"] / 64, rel=1e-3)


def test_ddp_keeps_everything_and_sums_the_gradients_in_one_tensor():
    step = {"batch_size": 1, "max_length": 16, "optimizer": "sgd"}
    alone, ddp = (
        extended(skeleton("llama", **LARGE), "full", Workload(**step, **changes))
        for changes in ({}, {"devices": 4, "strategy": "ddp"})
    )
    assert ddp.phase == "optimizer"
    # The weights have the frequencies of positions besides.
    assert ddp.breakdown["gradients"] == pytest.approx(ddp.breakdown["weights"], abs=4096)
    assert ddp.breakdown["transient"] == pytest.approx(ddp.breakdown["gradients"], abs=4096)
    assert alone.breakdown["weights"] == ddp.breakdown["weights"]


def test_more_devices_hold_no_less_of_the_adapter():
    def found(devices, strategy):
        workload = Workload(batch_size=1, max_length=128, r=64, devices=devices, strategy=strategy)
        return trace(skeleton("llama", **SMALL), "lora", workload)

    alone, shared = found(1, "single"), found(8, "fsdp")
    for term in ("adapters", "optimizer"):
        assert shared.breakdown[term] == alone.breakdown[term] > 0
    # The real model keeps vectors whole.
    assert shared.breakdown["weights"] == pytest.approx(alone.breakdown["weights"] / 8, rel=0.03)
    assert shared.network.micro_batch > alone.breakdown["weights"]
    assert alone.network == Traffic()


@pytest.mark.parametrize("method", ["qdora", *long([("full",)])])
def test_a_thousand_processes_that_are_not_there_are_traced(method):
    """What FSDP2 itself keeps of the real model, and gathers."""
    size = SMALL | {"vocab_size": 1 << 16, "num_hidden_layers": 3}

    def found(devices):
        workload = Workload(batch_size=1, max_length=128, devices=devices, strategy="fsdp", optimizer="rmsprop")
        return trace(skeleton("llama", **size), method, workload)

    few, many = found(8), found(1024)
    kept = [each.breakdown["weights"] + each.breakdown["weights_4bit"] for each in (few, many)]
    assert kept[1] < kept[0] / (100 if method == "full" else 20)
    assert few.breakdown["optimizer"] / many.breakdown["optimizer"] == pytest.approx(
        128 if method == "full" else 1, rel=0.2
    )
    # The embedding and the head are whole while a step runs: 2 V h in the dtype of the weights.
    assert many.breakdown["transient"] > 2 * (1 << 16) * 128 * (4 if method == "full" else 2)
    assert many.peak_bytes < few.peak_bytes


@pytest.mark.parametrize("method", ["qlora", *long([("full",)])])
def test_shards_of_a_step_that_was_traced_alone_are_near_those_of_the_trace(method, monkeypatch, tmp_path):
    """A run that has its own group of processes cannot have another of fake ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = {"model_type": "llama", **LARGE, "num_hidden_layers": 12, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    workload = Workload(batch_size=4, max_length=512, devices=8, strategy="fsdp")
    fake = estimate(tmp_path, method, workload)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "anew"))
    assert estimate(tmp_path, method, workload).peak_bytes == pytest.approx(fake.peak_bytes, rel=0.04)
