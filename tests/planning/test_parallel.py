"""What one of several devices holds."""

from __future__ import annotations

import pytest
from planning_models import config_of, skeleton

from rankwise.config import DORA, FOUR_BITS
from rankwise.planning import TERMS, Workload
from rankwise.planning.adapted import adaptation
from rankwise.planning.dry_run import sharding_groups_of
from rankwise.planning.fake_model import attach, materialize, weights_dtype
from rankwise.planning.parallel import Group, layer_and_root, per_device
from rankwise.planning.shape import shape_of
from rankwise.planning.weights import sharding_groups

SMALL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TERMS_OF = dict.fromkeys(TERMS, 1000)
LAYER, ROOT = Group(100, 10), Group(70, 7)


def shared(strategy: str, devices: int) -> dict[str, int]:
    workload = Workload(devices=devices, strategy=strategy)
    return per_device(TERMS_OF, workload, layer=LAYER, root=ROOT, trained_bytes=50)


def test_fsdp_shards_what_lasts_and_gathers_two_layers_and_the_root():
    found = shared("fsdp", 4)
    assert found["weights"] == found["optimizer"] == found["gradients"] == 250
    assert found["activations"] == 1000
    assert found["transient"] == 1000 + 2 * (100 + 10) + (70 + 7)


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
    attach(model, method, workload)
    found_layer, found_root = sharding_groups_of(model)
    assert root == found_root
    assert layer.gradient_bytes == found_layer.gradient_bytes
    # The scales of 4-bit weights are buffers, which FSDP2 leaves where they are; the closed form counts them in.
    assert layer.tensor_bytes == pytest.approx(found_layer.tensor_bytes, rel=0.05 if method in FOUR_BITS else 0)
