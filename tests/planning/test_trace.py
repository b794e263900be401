"""A trace counts what a real step really holds, by the same count of storages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from planning_models import skeleton, trace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from rankwise.acceleration import parts
from rankwise.errors import ModelError
from rankwise.labels import Labels
from rankwise.models.load import skeleton_of
from rankwise.ops.experts import rows_per_expert
from rankwise.ops.selection import native_on_cpu
from rankwise.planning import TERMS, Workload
from rankwise.planning.tracker import QuickFakes, StorageTracker
from rankwise.training.step import TrainingStep
from tables import thinned

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
STEP = {"batch_size": 2, "max_length": 48, "r": 8, "device_type": "cpu"}


@thinned({"method": ["full", "lora", "qlora", "dora", "qdora"], "checkpointing": [False, True]})
def test_fake_steps_hold_what_real_ones_do(method, checkpointing):
    workload = Workload(gradient_checkpointing=checkpointing, **STEP)
    fake = trace(skeleton("llama", **SMALL), method, workload)
    real = trace(skeleton("llama", **SMALL), method, workload, fake=False)
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=5e-3)
    assert fake.phase == real.phase


@pytest.mark.parametrize("method", ["full", "qdora"])
def test_so_they_do_without_our_fused_parts(method):
    """``--no-fast``: PyTorch's own step, which holds more; long rows, since every layer keeps a mask of all pairs."""
    workload = Workload(fast=False, **STEP | {"max_length": 192})
    fake, real = (trace(skeleton("llama", **SMALL), method, workload, fake=is_fake) for is_fake in (True, False))
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=5e-3)
    fused = trace(skeleton("llama", **SMALL), method, dataclasses.replace(workload, fast=True))
    assert fake.peak_bytes - _overhead(fake) >= fused.peak_bytes - _overhead(fused)
    assert any("PyTorch's own step" in note for note in fake.notes)


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", "lora"), ("qwen3", "dora"), ("gemma3_text", "qlora")],
)
def test_so_they_do_in_other_families(family, method):
    changes = SMALL | ({"intermediate_size": 512} if family == "gpt2" else {})
    workload = Workload(**STEP)
    fake, real = (trace(skeleton(family, **changes), method, workload, fake=is_fake) for is_fake in (True, False))
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=5e-3)


@pytest.mark.parametrize(
    ("family", "method", "evaluation"), [("llama", "lora", False), ("llama", "full", True), ("bert", "qdora", False)]
)
def test_so_they_do_with_a_head_of_labels(family, method, evaluation):
    config = AutoConfig.for_model(family, **SMALL)
    workload = Workload(objective="classify", labels=3, evaluation=evaluation, **STEP)
    made = [skeleton_of(config, Labels(("a", "b", "c"))) for _ in range(2)]
    fake, real = trace(made[0], method, workload), trace(made[1], method, workload, fake=False)
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=1e-2)
    if family == "llama" and not evaluation:
        # Without the vocabulary's head and logits.
        words = trace(skeleton_of(config), method, Workload(**STEP))
        assert fake.peak_bytes < words.peak_bytes - 1024 * 128 * 2


def test_fused_projections_of_which_parts_adapt():
    settings = {"target_modules": ("c_attn",), "enable_lora": {"c_attn": (True, False, True)}}
    fake, real = (
        trace(skeleton("gpt2", **SMALL), "dora", Workload(**STEP, **settings), fake=is_fake)
        for is_fake in (True, False)
    )
    assert fake.trainable_parameters == real.trainable_parameters
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=5e-3)


@thinned({"family": ["mixtral", "qwen3_moe"], "checkpointing": [False, True]})
def test_4_bit_experts_hold_what_real_ones_do(family, checkpointing):
    """Where each token visits all experts: a trace spreads tokens evenly, while the tokens of a test are all alike."""
    sizes = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 4}
    workload = Workload(gradient_checkpointing=checkpointing, **STEP)
    fake, real = (
        trace(skeleton(family, **SMALL, **sizes), "qlora", workload, fake=is_fake) for is_fake in (True, False)
    )
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=5e-3)
    assert fake.phase == real.phase
    dense = trace(skeleton(family, **SMALL, **sizes), "lora", workload)
    assert fake.breakdown["weights_4bit"] + fake.breakdown["weights"] < 0.5 * dense.breakdown["weights"]


@thinned({"family": ["mixtral", "qwen3_moe"], "method": ["lora", "qlora"], "checkpointing": [False, True]})
def test_experts_that_adapt_hold_what_real_ones_do(family, method, checkpointing):
    sizes = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 4}
    targets = {"target_parameters": ("experts.gate_up_proj", "experts.down_proj")}
    workload = Workload(gradient_checkpointing=checkpointing, **STEP, **targets)
    fake, real = (
        trace(skeleton(family, **SMALL, **sizes), method, workload, fake=is_fake) for is_fake in (True, False)
    )
    assert fake.trainable_parameters == real.trainable_parameters
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=5e-3)
    assert fake.phase == real.phase


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_single_row_has_no_mask_but_where_it_outgrows_a_window(dtype, window):
    """transformers drops a mask that hides nothing, and takes a fake one for one that may."""
    changes = SMALL | {"sliding_window": window}
    workload = Workload(**STEP | {"batch_size": 1, "max_length": 256, "dtype": dtype})
    fake, real = (trace(skeleton("mistral", **changes), "lora", workload, fake=is_fake) for is_fake in (True, False))
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=5e-3)
    masks = 2 * 256 * 256 * 4
    if window is not None and dtype == "float32":
        # Our attention, which takes float32 on some CPUs, is given ranges; PyTorch's keeps the mask.
        slow = dataclasses.replace(workload, fast=False)
        masked, unmasked = (trace(skeleton("mistral", **sizes), "lora", slow) for sizes in (changes, SMALL))
        assert masked.breakdown["activations"] - unmasked.breakdown["activations"] > masks


def test_what_one_more_option_of_the_step_keeps_is_planned(monkeypatch):
    """A made-up one, of which no line of planning knows: the plan runs the run's step."""
    own, size = TrainingStep.gradients, 50 * 10**6

    def keeping(self, batches, targets):
        kept = torch.empty(size, dtype=torch.uint8)
        found = own(self, batches, targets)
        del kept
        return found

    without = trace(skeleton("llama", **SMALL), "lora", Workload(**STEP)).peak_bytes
    monkeypatch.setattr(TrainingStep, "gradients", keeping)
    assert trace(skeleton("llama", **SMALL), "lora", Workload(**STEP)).peak_bytes == without + size


@pytest.mark.parametrize(
    "more",
    [
        {"products": "int8"},
        {"neftune_noise_alpha": 5.0},
        {"objective": "dpo"},
        {"objective": "dpo", "keeps_reference": True},
        {"objective": "dpo", "products": "int8"},
        {"objective": "kto"},
        {"objective": "grpo", "beta": 0.1},
    ],
)
def test_so_they_do_with_options_of_the_step(more):
    workload = Workload(**STEP, **{"products": "bfloat16", **more})
    fake, real = (trace(skeleton("llama", **SMALL), "lora", workload, fake=is_fake) for is_fake in (True, False))
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=5e-3)


def test_of_many_experts_a_trace_visits_some():
    sizes = {"num_experts": 32, "num_experts_per_tok": 32}
    workload = Workload(**STEP)
    fake, real = (
        trace(skeleton("qwen3_moe", **SMALL, **sizes), "qlora", workload, fake=is_fake) for is_fake in (True, False)
    )
    assert fake.peak_bytes - _overhead(fake) == pytest.approx(real.peak_bytes - _overhead(real), rel=5e-3)
    assert rows_per_expert(FakeTensorMode().from_tensor(torch.zeros(640, dtype=torch.long)), 32) == [40] * 16 + [0] * 16


def _overhead(found) -> int:
    return found.breakdown["overhead"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_on_a_card_our_parts_keep_what_they_read_alone(method):
    """Of an MLP gate and up, where PyTorch's keeps act(gate) and the product too; of a norm its input, where PyTorch's
    keeps a float32 copy and adapters what they read."""
    sizes = {"batch_size": 4, "max_length": 512, "r": 8}
    tokens, layers = 4 * 512, SMALL["num_hidden_layers"]
    h, f = SMALL["hidden_size"], SMALL["intermediate_size"]

    def less(dtype):
        ours, torchs = (
            trace(skeleton("llama", **SMALL), method, Workload(triton=has, dtype=dtype, **sizes))
            for has in (True, False)
        )
        return torchs.breakdown["activations"] - ours.breakdown["activations"]

    # No gradient goes through the first norm: neither keeps anything, and adapters what they read.
    norms, last = 2 * layers - 1, (4 - 2) * h
    assert less("bfloat16") == tokens * (layers * 2 * 2 * f + norms * (4 + 2 - 2) * h + last)
    # In float16 adapters keep what they read.
    assert less("float16") == tokens * (layers * 2 * 2 * f + norms * (4 - 2) * h + last)


@pytest.mark.parametrize(("method", "mb_per_token"), [("lora", 3.1), ("dora", 3.6)])
def test_an_8b_llama_keeps_no_more_than_is_wanted_of_a_card(method, mb_per_token):
    """One row of 8,192 tokens; each of its 32 layers keeps the same."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}

    def kept(layers):
        model = skeleton("llama", **shape, head_dim=128, vocab_size=1024, num_hidden_layers=layers)
        return trace(model, method, Workload(batch_size=1, max_length=8192)).breakdown["activations"]

    assert 32 * (kept(3) - kept(2)) / 8192 <= mb_per_token * 1e6


def test_terms_sum_to_the_peak_and_have_known_names():
    found = trace(skeleton("llama", **SMALL), "qdora", Workload(batch_size=2, max_length=64))
    assert sum(found.breakdown.values()) == found.peak_bytes
    assert tuple(found.breakdown) == TERMS
    assert found.idle_bytes <= found.outside_bytes <= found.idle_bytes + found.breakdown["overhead"]


def test_longer_rows_and_larger_batches_take_more():
    def peak(**changes):
        workload = Workload(**{"batch_size": 2, "max_length": 64, **changes})
        return trace(skeleton("llama", **SMALL), "lora", workload).peak_bytes

    assert peak() < peak(max_length=128) < peak(max_length=128, batch_size=4)
    assert peak(max_length=256, gradient_checkpointing=True) < peak(max_length=256)
    assert peak(max_length=256, activation_offloading=True) < peak(max_length=256)


def test_paged_states_wait_elsewhere_and_are_said():
    workload = Workload(batch_size=1, max_length=64, r=512, optimizer="paged_adamw_32bit")
    found = trace(skeleton("llama", **SMALL), "lora", workload)
    assert (
        found.breakdown["optimizer"]
        < trace(skeleton("llama", **SMALL), "lora", Workload(batch_size=1, max_length=64, r=512)).breakdown["optimizer"]
    )
    assert any("host's memory" in note for note in found.notes)


def test_a_forward_that_asks_for_values_is_explained():
    model = skeleton("llama", **SMALL)

    def forward(input_ids, **_):
        if input_ids.tolist():
            raise AssertionError("unreachable")

    model.forward = forward
    with pytest.raises(ModelError, match="LlamaForCausalLM") as caught:
        trace(model, "lora", Workload(batch_size=1, max_length=32, device_type="cpu"))
    assert caught.value.code == "RW327"


def test_the_tracker_counts_known_storages():
    layer, x = nn.Linear(256, 512, bias=False), torch.ones(8, 256)
    with StorageTracker() as tracker:
        tracker.see_all([layer.weight], "weights")
        tracker.enter("forward")
        y = layer(x)
        z = y[:, :16]
        del y
        tracker.enter("backward")
        z.sum().backward()
    # W, its gradient, y, and the gradient of y while W's is made; scalars.
    weight, output = 4 * 512 * 256, 4 * 8 * 512
    held = max(tracker.peaks().values(), key=lambda terms: sum(terms.values()))
    assert held["weights"] == weight
    assert 2 * weight + 2 * output <= sum(held.values()) <= 2 * weight + 3 * output + 1024


# Operations without the fake mode's overhead.

FEW = {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("family", "method", "device"),
    [("llama", "qdora", "cuda"), ("qwen3", "dora", "cpu"), ("gpt2", "full", "cuda"), ("mixtral", "qlora", "cpu")],
)
def test_steps_hold_the_same(family, method, device, monkeypatch):
    workload = Workload(batch_size=2, max_length=300, device_type=device, lora_dropout=0.1, gradient_checkpointing=True)
    quick = trace(skeleton(family, **FEW), method, workload)
    monkeypatch.setattr(QuickFakes, "__call__", lambda *_: NotImplemented)
    plain = trace(skeleton(family, **FEW), method, workload)
    assert quick.breakdown == plain.breakdown


# On a card AdamW copies nothing; RMSprop does.
@pytest.mark.parametrize(
    ("family", "method", "optimizer"),
    [("llama", "full", "adamw_torch"), ("llama", "dora", "rmsprop")],
)
def test_so_they_are_where_the_optimizer_holds_most(family, method, optimizer, monkeypatch):
    workload = Workload(batch_size=1, max_length=16, device_type="cuda", r=256, optimizer=optimizer)
    quick = trace(skeleton(family, **FEW), method, workload)
    monkeypatch.setattr(QuickFakes, "__call__", lambda *_: NotImplemented)
    plain = trace(skeleton(family, **FEW), method, workload)
    assert quick.phase == "optimizer"
    assert (quick.phase, quick.breakdown) == (plain.phase, plain.breakdown)


def test_storages_are_shared_where_views_are():
    quick, aten = QuickFakes(), torch.ops.aten
    with FakeTensorMode():
        x = torch.ones(4, 6)
        for func, *others in [(aten.view.default, [24]), (aten._unsafe_view.default, [6, 4]), (aten.mul_.Tensor, x)]:
            made = quick(func, (x, *others), {})
            assert made.untyped_storage()._cdata == x.untyped_storage()._cdata
        for _ in range(2):
            made = quick(aten.mul.Tensor, (x, x), {})
            assert made.shape == x.shape
            assert made.untyped_storage()._cdata != x.untyped_storage()._cdata


def test_what_has_values_or_another_device_is_left_to_the_mode():
    quick, aten = QuickFakes(), torch.ops.aten
    real = torch.ones(2)
    assert quick(aten.mul.Tensor, (real, real), {}) is NotImplemented
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ones(2)
        assert quick(aten.mul.Tensor, (fake, real), {}) is NotImplemented
        assert quick(aten.t_.default, (fake,), {}) is NotImplemented


def test_rotary_functions_are_told_apart_on_fake_tensors_too(capfd):
    """A plan replaces those that a run replaces, and torch prints nothing of those that do not fit."""

    def swapped(q, k, cos, sin, unsqueeze_dim=1):
        return modeling_llama.apply_rotary_pos_emb(q, k, sin, cos)

    for original in (modeling_llama.apply_rotary_pos_emb, modeling_gpt_oss.apply_rotary_pos_emb, swapped):
        if isinstance(original, parts.FastRope):
            original = original.original
        expected = parts._rope_agrees(original, torch.empty(0))
        with FakeTensorMode():
            assert parts._rope_agrees(original, torch.empty(0)) == expected
        assert expected == (original.__module__ == modeling_llama.__name__) or not native_on_cpu()
    assert "Traceback" not in capfd.readouterr().err
