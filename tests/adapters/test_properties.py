"""What must hold for every adapter on every base in every dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted_models import IDS, logits, step
from adapter_table import ADAPTERS, BASES, CASES, build
from torch import nn

import rankwise as rw
from marks import at_some_level
from precision import assert_as_exact, merged_in_float64
from rankwise.errors import AdapterError
from tables import thinned
from tiny_models import tiny_gpt2

pytestmark = at_some_level


@pytest.mark.parametrize(("adapter", "base", "dtype"), CASES)
def test_identity_at_init(adapter, base, dtype):
    model, config = build(adapter, base, dtype)
    before = logits(model)
    rw.add_adapter(model, config)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0)


@pytest.mark.parametrize(("adapter", "base", "dtype"), [case for case in CASES if torch.float32 in case.values])
def test_an_adapter_is_on_the_device_of_its_layers(adapter, base, dtype):
    model, config = build(adapter, base, dtype)
    rw.add_adapter(model.to("meta"), config)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(("adapter", "base", "dtype"), CASES)
def test_only_adapter_parameters_train(adapter, base, dtype):
    model, config = build(adapter, base, dtype, init_lora_weights=False)
    report = rw.add_adapter(model, config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    ours = rw.adapter_parameters(model)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in ours.values())
    identities = {id(parameter) for parameter in ours.values()}
    assert not [name for name, p in model.named_parameters() if p.grad is not None and id(p) not in identities]
    assert report.trainable_parameters == sum(parameter.numel() for parameter in ours.values())


@pytest.mark.parametrize(("adapter", "base", "dtype"), CASES)
def test_merged_equals_unmerged_and_unmerge_is_exact(adapter, base, dtype):
    model, config = build(adapter, base, dtype)
    start = logits(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    rw.add_adapter(model, config)
    step(model)
    adapted, exact = logits(model), logits(merged_in_float64(model))
    moved = (adapted - start).abs().max()
    assert moved > 0.01
    # Two ways that share no code.
    assert dtype is not torch.float32 or (adapted - exact).abs().max() < 0.005 * moved

    rw.merge_adapter(model)
    assert not [module for module in model.modules() if type(module).__name__ in ("AdaptedLayer", "TrainedCopy")]
    # The merged weight is rounded, as are the numbers between layers.
    assert_as_exact([logits(model)], [adapted], [exact], slack=2, dtype=dtype)

    rw.unmerge_adapter(model)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=0)
    rw.disable_adapter(model)
    torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    rw.enable_adapter(model)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=0)
    rw.remove_adapter(model)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("adapter", "base", "dtype"), CASES)
def test_save_and_load_is_exact(adapter, base, dtype, tmp_path):
    model, config = build(adapter, base, dtype)
    rw.add_adapter(model, config)
    step(model)
    rw.save_adapter(model, tmp_path)
    other, _ = build(adapter, base, dtype)
    rw.load_adapter(other, tmp_path)
    saved, loaded = rw.adapter_parameters(model), rw.adapter_parameters(other)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key].detach(), loaded[key].detach()) for key in saved)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in loaded.values())


@pytest.mark.parametrize("base", BASES)
def test_state_dict_keeps_the_names_of_the_plain_model(base):
    plain, config = build("dora", base, torch.float32)
    adapted = copy.deepcopy(plain)
    rw.add_adapter(adapted, config)
    assert set(plain.state_dict()) <= set(adapted.state_dict())
    assert all(".adapters." in key for key in set(adapted.state_dict()) - set(plain.state_dict()))
    missing, unexpected = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".adapters." in key for key in missing)


def test_several_adapters_are_switched():
    model, config = build("lora", "llama", torch.float32)
    base = logits(model)
    outputs = {}
    for name in ("first", "second"):
        rw.add_adapter(model, config, name=name)
        step(model, rate=0.1 if name == "first" else 0.2)
        outputs[name] = logits(model)
    assert (outputs["first"] - outputs["second"]).abs().max() > 0.01
    for name, expected in outputs.items():
        rw.set_adapter(model, name)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
        trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert trainable == {id(parameter) for parameter in rw.adapter_parameters(model, name).values()}
    with rw.adapter_disabled(model):
        torch.testing.assert_close(logits(model), base, rtol=0, atol=0)
    rw.remove_adapter(model, "first")
    torch.testing.assert_close(logits(model), outputs["second"], rtol=0, atol=0)


def test_dropout_acts_on_the_low_rank_path_only():
    model, config = build("lora", "llama", torch.float32, lora_dropout=0.5)
    before = logits(model)
    rw.add_adapter(model, config)
    model.train()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    step(model)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    torch.testing.assert_close(logits(model), logits(model), rtol=0, atol=0)


def test_a_trained_head_is_untied():
    model, config = build("whole_head", "llama_tied", torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rw.add_adapter(model, config)
    embedding = model.model.embed_tokens.weight.clone()
    step(model)
    rw.merge_adapter(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not torch.equal(model.lm_head.weight, embedding)
    assert model.config.tie_word_embeddings is False


def test_an_adapter_for_inference_stays_frozen(tmp_path):
    model, config = build("dora", "llama", torch.float32)
    rw.add_adapter(model, config)
    rw.save_adapter(model, tmp_path)
    other, _ = build("dora", "llama", torch.float32)
    rw.load_adapter(other, tmp_path, trainable=False)
    rw.set_adapter(other, "default")
    assert not any(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_disabled_or_not_the_adapter_saves_its_own_biases(bias, tmp_path):
    model, config = build("lora", "llama", torch.float32, bias=bias)
    rw.add_adapter(model, config)
    step(model)
    adapted = logits(model)
    with rw.adapter_disabled(model):
        with rw.adapter_disabled(model):
            base = logits(model)
        torch.testing.assert_close(logits(model), base, rtol=0, atol=0)
        rw.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=0)
    other, _ = build("lora", "llama", torch.float32)
    torch.testing.assert_close(logits(other), base, rtol=0, atol=0)
    rw.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), adapted, rtol=0, atol=0)


@pytest.mark.parametrize("whole", ["norm", "lm_head"])
def test_a_tied_head_stays_tied_where_nothing_unties_it(whole, tmp_path):
    model = BASES["llama_tied"]()
    before = logits(model)
    rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[whole]))
    step(model)
    adapted = logits(model)
    rw.merge_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-5, atol=1e-5)
    rw.unmerge_adapter(model)
    rw.remove_adapter(model)
    model.save_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "base")), before, rtol=0, atol=0)


def test_while_merged_nothing_else_can_be_done(tmp_path):
    model, config = build("lora", "llama", torch.float32)
    rw.add_adapter(model, config)
    rw.merge_adapter(model)
    actions = (
        lambda: rw.add_adapter(model, config, name="other"),
        lambda: rw.save_adapter(model, tmp_path / "adapter"),
        lambda: rw.disable_adapter(model),
        lambda: rw.set_adapter(model, "default"),
        lambda: rw.remove_adapter(model),
        lambda: rw.adapter_parameters(model),
        lambda: rw.merge_adapter(model),
    )
    for action in actions:
        with pytest.raises(AdapterError, match="RW408"):
            action()
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_an_adapted_head_shows_its_weight_with_gradients(adapter):
    model, _ = build(adapter, "llama", torch.float32)
    settings = {"r": 2, "target_modules": ["lm_head", "q_proj"], "init_lora_weights": False, **ADAPTERS[adapter]}
    rw.add_adapter(model, rw.LoraConfig(**settings))
    hidden = model.model(input_ids=IDS).last_hidden_state
    by_hand = hidden @ model.lm_head.weight.T
    torch.testing.assert_close(by_hand, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    by_hand.square().sum().backward()
    head = {key: p.grad for key, p in rw.adapter_parameters(model).items() if "lm_head" in key}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in head.values())


def test_an_embedding_that_came_with_the_adapter_leaves_with_it(tmp_path):
    from safetensors.torch import load_file, save_file

    model, config = build("lora", "llama", torch.float32)
    base = logits(model)
    rw.add_adapter(model, config)
    rw.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    own_head = torch.randn_like(model.lm_head.weight)
    tensors = {**load_file(path), "base_model.model.lm_head.weight": own_head}
    save_file(tensors, path, metadata={"format": "pt"})
    other, _ = build("lora", "llama", torch.float32)
    rw.load_adapter(other, tmp_path)
    assert torch.equal(other.lm_head.weight, own_head)
    adapted = logits(other)
    with rw.adapter_disabled(other):
        torch.testing.assert_close(logits(other), base, rtol=0, atol=0)
    torch.testing.assert_close(logits(other), adapted, rtol=0, atol=0)
    rw.save_adapter(other, tmp_path / "again")
    assert torch.equal(
        load_file(tmp_path / "again" / "adapter_model.safetensors")["base_model.model.lm_head.weight"], own_head
    )
    rw.remove_adapter(other)
    torch.testing.assert_close(logits(other), base, rtol=0, atol=0)


def test_a_fused_projection_with_rank_and_alpha_patterns(tmp_path):
    settings = {"rank_pattern": {"h.0.attn.c_attn": 2}, "alpha_pattern": {"c_attn": 5}, "use_rslora": True}
    model, config = build("fused_lora", "gpt2", torch.float32, **settings)
    rw.add_adapter(model, config)
    step(model)
    rw.save_adapter(model, tmp_path)
    other, _ = build("fused_lora", "gpt2", torch.float32)
    rw.load_adapter(other, tmp_path)
    assert dict(rw.adapter_config(other).rank_pattern) == settings["rank_pattern"]
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here; install the extra `bench`")
    theirs = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_hooks_of_accelerate_come_off_the_base_and_not_the_adapters():
    hooks = pytest.importorskip("accelerate.hooks")
    model, config = build("lora", "llama", torch.float32, modules_to_save=["norm"])
    hooks.attach_align_device_hook(model, execution_device="cpu")
    rw.add_adapter(model, config)
    step(model)
    adapted = logits(model)
    hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=0)
    assert not any("_old_forward" in module.__dict__ for module in model.modules())


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "to_dtype": lambda model: model.to(dtype=torch.float16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "type": lambda model: model.type(torch.bfloat16),
    "parent": lambda model: nn.Sequential(nn.ModuleDict({"inner": model})).to("cpu", torch.bfloat16),
}


@thinned({"cast": list(CASTS), "base": ["llama", "gpt2"]})
def test_casting_the_model_leaves_the_adapter_its_precision(cast, base):
    model, config = build("embedding_dora", base, torch.float32)
    rw.add_adapter(model, config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    before = {key: value.detach().clone() for key, value in rw.adapter_parameters(model).items()}
    CASTS[cast](model)
    lowered = next(iter(model.parameters())).dtype
    assert lowered in (torch.bfloat16, torch.float16)
    for key, value in rw.adapter_parameters(model).items():
        assert value.grad.dtype is value.dtype
        assert value.dtype is torch.float32
        assert torch.equal(value, before[key])
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_casting_up_takes_the_adapter_along():
    model, config = build("dora", "llama", torch.float32)
    rw.add_adapter(model, config)
    model.double()
    assert {value.dtype for value in rw.adapter_parameters(model).values()} == {torch.float64}
    model.float()
    assert {value.dtype for value in rw.adapter_parameters(model).values()} == {torch.float32}
    model.to("meta")
    assert {value.device.type for value in rw.adapter_parameters(model).values()} == {"meta"}
