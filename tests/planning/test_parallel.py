"""What one of several devices holds."""

from __future__ import annotations

import pytest
from planning_models import config_of, skeleton

from rankwise.config import FOUR_BITS
from rankwise.planning import TERMS, Workload
from rankwise.planning.architectures import shape_of
from rankwise.planning.closed_form import of_shape
from rankwise.planning.dry_run import sharding_groups_of, trace
from rankwise.planning.fake_model import materialize, prepare, weights_dtype
from rankwise.planning.parallel import Group, layer_and_root, per_device, traffic
from rankwise.planning.step_facts import StepFacts
from rankwise.planning.terms import Traffic
from rankwise.planning.weights import sharding_groups
from tables import long

SMALL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LARGE = SMALL | {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "head_dim": 512}
DEEP = LARGE | {"num_hidden_layers": 12}
TERMS_OF = dict.fromkeys(TERMS, 1000)
WHOLE = Workload(devices=4, strategy="fsdp")
LAYER, ROOT = Group(100, 10), Group(70, 7)


def shared(strategy: str, devices: int, phase: str = "backward", method: str = "full") -> dict[str, int]:
    workload = Workload(devices=devices, strategy=strategy)
    return per_device(TERMS_OF, method, workload, phase=phase, layer=LAYER, root=ROOT, trained_bytes=50)


def test_fsdp_shards_what_lasts_and_gathers_two_layers_and_the_root():
    found = shared("fsdp", 4)
    assert found["weights"] == found["optimizer"] == found["gradients"] == 250
    assert found["activations"] == 1000
    assert found["transient"] == 1000 + 2 * (100 + 10) + (70 + 7)


@pytest.mark.parametrize(("layer", "root"), [(Group(100, 110), ROOT), (ROOT, Group(100, 110))])
def test_gloo_moves_the_largest_group_in_a_copy_of_its_own(layer, root):
    for phase in ("forward", "backward", "optimizer"):
        card, cpu = (
            per_device(
                TERMS_OF,
                "full",
                Workload(devices=4, strategy="fsdp", device_type=kind),
                phase=phase,
                layer=layer,
                root=root,
                trained_bytes=50,
            )
            for kind in ("cuda", "cpu")
        )
        more = {"forward": 100, "backward": 110, "optimizer": 0}[phase]
        assert cpu == card | {"transient": card["transient"] + more}


def test_every_device_holds_the_whole_adapter():
    found = shared("fsdp", 4, method="qlora")
    assert found["weights"] == found["weights_4bit"] == 250
    assert found["adapters"] == found["gradients"] == found["optimizer"] == 1000
    # Its gradients are summed in one tensor, where the optimizer takes no more.
    big = per_device(TERMS_OF, "qlora", WHOLE, phase="optimizer", layer=LAYER, root=ROOT, trained_bytes=3000)
    assert (big["transient"], shared("fsdp", 4, "optimizer", "qlora")["transient"]) == (3000, 1000)


def test_a_ring_sends_almost_every_byte_once_to_gather_and_twice_to_sum():
    sizes = {"weight_bytes": 1000, "root_bytes": 200, "trained_bytes": 40}
    ddp, fsdp = Workload(devices=4, strategy="ddp"), Workload(devices=4, strategy="fsdp")
    assert traffic("lora", ddp, **sizes) == Traffic(0, 60)
    # Each way through the layers gathers them; the root stays from the first to the last.
    assert traffic("lora", fsdp, **sizes) == Traffic(1350, 60)
    assert traffic("full", fsdp, **sizes) == Traffic(1350 + 750)
    assert traffic("lora", fsdp, **sizes).of_step(3) == 3 * 1350 + 60
    assert traffic("full", Workload(), **sizes) == Traffic()


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
    # Of two layers both are gathered and nothing else is kept, which the closed form counts at once.
    closed = of_shape(shape_of(config_of("llama", **DEEP)), "full", workload)
    assert closed.peak_bytes / trace(skeleton("llama", **DEEP), "full", workload).peak_bytes - 1 == pytest.approx(
        0, abs=0.15
    )


def test_ddp_keeps_everything_and_the_gradients_twice():
    assert shared("ddp", 4) == {**TERMS_OF, "transient": 1050}


def test_a_layer_is_told_by_its_number_and_the_root_is_the_rest():
    parts = [("model.embed_tokens", Group(5, 0)), ("model.layers.0.mlp.up_proj", Group(3, 1))]
    parts += [("model.layers.1.mlp.up_proj", Group(4, 0)), ("model.layers.1.mlp.down_proj", Group(2, 2))]
    assert layer_and_root([*parts, ("lm_head", Group(1, 1))]) == (Group(6, 2), Group(6, 1))


@pytest.mark.parametrize("exact", [False, True])
def test_more_devices_hold_no_less_of_the_adapter(exact):
    def found(devices, strategy):
        workload = Workload(batch_size=1, max_length=128, r=64, devices=devices, strategy=strategy)
        if exact:
            return trace(skeleton("llama", **SMALL), "lora", workload)
        return of_shape(shape_of(config_of("llama", **SMALL)), "lora", workload)

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


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_the_groups_of_the_closed_form_are_those_of_the_model(method):
    workload = Workload(r=8, device_type="cpu", dtype="float32", devices=2, strategy="fsdp")
    layer, root = sharding_groups(StepFacts.of(shape_of(config_of("llama", **SMALL)), method, workload))
    model = skeleton("llama", **SMALL)
    materialize(model, weights_dtype(method, workload), fill=True)
    prepare(model, method, workload)
    found_layer, found_root = sharding_groups_of(model)
    assert root == found_root
    assert layer.gradient_bytes == found_layer.gradient_bytes
    # Second-level scales are replicated; the closed form counts them in.
    assert layer.tensor_bytes == pytest.approx(found_layer.tensor_bytes, rel=0.01 if method in FOUR_BITS else 0)
