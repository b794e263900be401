"""What one of several devices holds."""

from __future__ import annotations

import pytest
from planning_models import config_of, skeleton

from rankwise.config import DORA, FOUR_BITS
from rankwise.planning import TERMS, Workload
from rankwise.planning.adapted import adaptation
from rankwise.planning.architectures import shape_of
from rankwise.planning.closed_form import of_shape
from rankwise.planning.dry_run import sharding_groups_of, trace
from rankwise.planning.fake_model import materialize, prepare, weights_dtype
from rankwise.planning.parallel import Group, layer_and_root, per_device
from rankwise.planning.weights import sharding_groups

SMALL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LARGE = SMALL | {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "head_dim": 512}
TERMS_OF = dict.fromkeys(TERMS, 1000)
LAYER, ROOT = Group(100, 10), Group(70, 7)


def shared(strategy: str, devices: int, phase: str = "backward") -> dict[str, int]:
    workload = Workload(devices=devices, strategy=strategy)
    return per_device(TERMS_OF, workload, phase=phase, layer=LAYER, root=ROOT, trained_bytes=50)


def test_fsdp_shards_what_lasts_and_gathers_two_layers_and_the_root():
    found = shared("fsdp", 4)
    assert found["weights"] == found["optimizer"] == found["gradients"] == 250
    assert found["activations"] == 1000
    assert found["transient"] == 1000 + 2 * (100 + 10) + (70 + 7)


def test_gathered_gradients_come_with_the_backward_pass_and_the_optimizer_sees_shards_alone():
    assert shared("fsdp", 4, "forward")["transient"] == 1000 + 2 * 100 + 70
    assert shared("fsdp", 4, "optimizer")["transient"] == 250


@pytest.mark.parametrize("exact", [False, True])
def test_the_phase_is_that_in_which_a_device_holds_most(exact):
    """Alone a step peaks where gradients and states are whole; sharded, where activations are."""

    def found(**changes):
        # RMSprop copies what trains in its step; a card's AdamW does not.
        workload = Workload(batch_size=1, max_length=128, optimizer="rmsprop", **changes)
        if exact:
            return trace(skeleton("llama", **LARGE), "full", workload)
        return of_shape(shape_of(config_of("llama", **LARGE)), "full", workload)

    alone, shared = found(), found(devices=64, strategy="fsdp")
    assert alone.phase == "optimizer"
    assert shared.phase != "optimizer"
    assert shared.breakdown["activations"] > 0
    assert shared.breakdown["optimizer"] == pytest.approx(alone.breakdown["optimizer"] / 64, rel=1e-3)


def test_closed_form_meets_the_dry_run_on_shards():
    workload = Workload(batch_size=8, max_length=512, devices=8, strategy="fsdp")
    closed = of_shape(shape_of(config_of("llama", **LARGE)), "full", workload)
    assert closed.peak_bytes / trace(skeleton("llama", **LARGE), "full", workload).peak_bytes - 1 == pytest.approx(
        0.025, abs=0.055
    )


def test_ddp_keeps_everything_and_the_gradients_twice():
    assert shared("ddp", 4) == {**TERMS_OF, "transient": 1050}


def test_a_layer_is_told_by_its_number_and_the_root_is_the_rest():
    parts = [("model.embed_tokens", Group(5, 0)), ("model.layers.0.mlp.up_proj", Group(3, 1))]
    parts += [("model.layers.1.mlp.up_proj", Group(4, 0)), ("model.layers.1.mlp.down_proj", Group(2, 2))]
    assert layer_and_root([*parts, ("lm_head", Group(1, 1))]) == (Group(6, 2), Group(6, 1))


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_the_groups_of_the_closed_form_are_those_of_the_model(method):
    workload = Workload(r=8, device_type="cpu", dtype="float32", devices=2, strategy="fsdp")
    adapted = (
        None
        if method == "full"
        else adaptation(shape_of(config_of("llama", **SMALL)), workload.lora_config(use_dora=method in DORA))
    )
    layer, root = sharding_groups(shape_of(config_of("llama", **SMALL)), method, workload, adapted)
    model = skeleton("llama", **SMALL)
    materialize(model, weights_dtype(method, workload), fill=True)
    prepare(model, method, workload)
    found_layer, found_root = sharding_groups_of(model)
    assert root == found_root
    assert layer.gradient_bytes == found_layer.gradient_bytes
    # Second-level scales are replicated; the closed form counts them in.
    assert layer.tensor_bytes == pytest.approx(found_layer.tensor_bytes, rel=0.01 if method in FOUR_BITS else 0)
