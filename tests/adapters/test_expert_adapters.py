"""LoRA on stacked experts (target_parameters): what holds for every adapter, in every family, dense and in 4 bits."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapted_models import IDS, logits, step
from torch import nn

import rankwise as rw
from marks import at_some_level
from precision import assert_as_exact
from rankwise.adapters import experts as adapted
from rankwise.errors import AdapterError, ConfigError, RankwiseWarning
from rankwise.quantization.experts import four_bit_stacks
from tables import thinned
from tiny_models import tiny_llama, tiny_moe

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
TARGETS = {
    "both": {"target_parameters": BOTH, "target_modules": []},
    "first": {"target_parameters": BOTH[:1], "target_modules": []},
    "second": {"target_parameters": BOTH[1:], "target_modules": []},
    "attention_too": {"target_parameters": BOTH, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "target_parameters": BOTH,
        "target_modules": ["q_proj"],
        "rank_pattern": {"down_proj": 2, "layers.1.mlp.experts.gate_up_proj": 5},
        "alpha_pattern": {"gate_up_proj": 3},
    },
    "one_layer": {"target_parameters": ["model.layers.1.mlp.experts.down_proj"], "target_modules": []},
}
CASES = [(family, targets) for family in ("mixtral", "gpt_oss") for targets in TARGETS] + [("qwen3_moe", "both")]


def config(targets: str = "both", **settings) -> rw.LoraConfig:
    return rw.LoraConfig(**{"r": 3, "lora_alpha": 8, **TARGETS[targets], **settings})


def base(family: str, four_bit: bool = False, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    model = tiny_moe(family, **settings).to(dtype)
    if four_bit:
        rw.quantize(model, rw.Nf4Config(block_size=32, double_quant=True))
    return model


@thinned({"family,targets": CASES, "four_bit": [False, True]})
def test_identity_at_init_and_only_adapters_train(family, targets, four_bit):
    model = base(family, four_bit)
    before = logits(model)
    report = rw.add_adapter(model, config(targets))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    step(model)
    assert (logits(model) - before).abs().max() > 1e-3
    model(input_ids=IDS, labels=IDS).loss.backward()
    ours = rw.adapter_parameters(model)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in ours.values())
    identities = {id(parameter) for parameter in ours.values()}
    assert not [name for name, p in model.named_parameters() if p.grad is not None and id(p) not in identities]
    assert report.trainable_parameters == sum(parameter.numel() for parameter in ours.values())


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_an_adapter_is_on_the_device_of_its_experts(family, targets):
    model = base(family).to("meta")
    rw.add_adapter(model, config(targets))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@thinned({"family,targets": CASES, "four_bit": [False, True]})
def test_merged_equals_unmerged_and_unmerge_is_exact(family, targets, four_bit):
    model = base(family, four_bit)
    start = logits(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    rw.add_adapter(model, config(targets))
    assert {key for key in model.state_dict() if ".adapters." not in key} == weights.keys()
    step(model)
    changed = logits(model)
    stacks = len(list(four_bit_stacks(model)))
    rw.merge_adapter(model)
    assert not [module for module in model.modules() if type(module).__name__ in ("AdaptedLayer", "AdaptedExperts")]
    torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-5)
    if four_bit:
        assert stacks - len(list(four_bit_stacks(model))) == sum(
            item.experts is not None for item in _modules(model, config(targets), family)
        )
    rw.unmerge_adapter(model)
    torch.testing.assert_close(logits(model), changed, rtol=0, atol=0)
    with rw.adapter_disabled(model):
        torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    rw.remove_adapter(model)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)


def _modules(model, settings, family):
    return rw.add_adapter(base(family), settings).modules


@thinned({"family,targets": CASES, "four_bit": [False, True]})
def test_save_and_load_is_exact(family, targets, four_bit, tmp_path):
    model = base(family, four_bit)
    rw.add_adapter(model, config(targets))
    step(model)
    rw.save_adapter(model, tmp_path)
    other = base(family, four_bit)
    rw.load_adapter(other, tmp_path)
    saved, loaded = rw.adapter_parameters(model), rw.adapter_parameters(other)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key].detach(), loaded[key].detach()) for key in saved)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)


def gradients(model: nn.Module, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {key: value.grad.clone() for key, value in rw.adapter_parameters(model).items()}


@thinned({"family,targets": [*CASES, ("qwen2_moe", "both")], "four_bit": [False, True]})
def test_gradients_by_hand_are_those_of_autograd(family, targets, four_bit, monkeypatch):
    model = base(family, four_bit)
    rw.add_adapter(model, config(targets, init_lora_weights=False))
    values, by_hand = logits(model), gradients(model)
    monkeypatch.setattr(adapted, "branches_of", lambda *_: None)
    torch.testing.assert_close(logits(model), values, rtol=1e-5, atol=1e-6)
    for key, expected in gradients(model).items():
        torch.testing.assert_close(by_hand[key], expected, rtol=1e-4, atol=1e-6)


@thinned({"family": ["qwen3_moe", "gpt_oss"], "four_bit": [False, True], "reentrant": [False, True]})
def test_checkpointing_repeats_the_same_step(family, four_bit, reentrant):
    model = base(family, four_bit).train()
    rw.add_adapter(model, config("attention_too", init_lora_weights=False))
    plain = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, plain[key], rtol=0, atol=0)


@at_some_level
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_is_no_worse_than_autograd(family, four_bit, monkeypatch):
    """Judged against float32, in one layer: whole models may send a token elsewhere."""
    exact = base(family, four_bit)
    rw.add_adapter(exact, config("both", init_lora_weights=False))
    exact = exact.model.layers[0].mlp.experts
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    x, dy = torch.randn(40, 32).to(torch.bfloat16), torch.randn(40, 32)
    index = torch.stack([torch.randperm(exact.num_experts)[:2] for _ in x])
    chosen = torch.rand(40, 2).to(torch.bfloat16)

    def outcome(layer: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        given = x.to(dtype, copy=True).requires_grad_()
        wanted = [given, *(value for value in layer.parameters() if value.requires_grad)]
        y = layer(given, index, chosen.to(dtype))
        return [y.detach(), *torch.autograd.grad((y.float() * dy).sum(), wanted)]

    expected = outcome(exact, torch.float32)
    by_hand = outcome(rounded, torch.bfloat16)
    monkeypatch.setattr(adapted, "branches_of", lambda *_: None)
    assert_as_exact(by_hand, outcome(rounded, torch.bfloat16), expected, slack=1.2, dtype=torch.bfloat16)


def test_what_is_kept_for_the_backward_pass():
    """Tokens once, what comes out of the first product, and the outputs that are weighed; no copy for each expert."""
    model = base("qwen3_moe")
    rw.add_adapter(model, config("both"))
    layer = model.model.layers[0].mlp.experts
    T, k, H, N = 40, 3, 32, 2 * 24
    x = torch.randn(T, H, requires_grad=True)
    index = torch.stack([torch.randperm(8)[:k] for _ in range(T)])
    weights = torch.rand(T, k)
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, index, weights)
    own = 4 * T * (H + k * N + 2 * k * 3) + 8 * T * k
    # The weights alone need the outputs, and have no gradient here.
    assert sum(kept.values()) - weights.nbytes in (own, own + 4 * T * k * H)


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    model = base("mixtral")
    rw.add_adapter(model, config("both", init_lora_weights=False))
    with torch.no_grad():
        for layer in model.model.layers:
            # The router's scores are the largest and the second largest for experts 0 and 1, whatever the token.
            layer.mlp.gate.register_forward_hook(
                lambda module, args, out: (out[0], out[1], torch.tensor([0, 1]).expand_as(out[2]))
            )
    for key, value in gradients(model).items():
        assert value[:2].any(), key
        assert not value[2:].any(), key


def test_autocast_to_another_dtype_takes_autograd():
    model = base("qwen3_moe")
    rw.add_adapter(model, config("both", init_lora_weights=False))
    experts = model.model.layers[0].mlp.experts
    merged = experts.adapters["default"].merge(experts.base_layer)
    index = torch.stack([torch.randperm(merged.num_experts)[:2] for _ in range(40)])
    given = torch.randn(40, 32), index, torch.rand(40, 2)
    exact, plain = merged(*given), copy.deepcopy(merged).bfloat16()(given[0].bfloat16(), index, given[2])
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted.branches_of(experts.base_layer, experts.adapters["default"], torch.zeros(1)) is None
        assert_as_exact([experts(*given)], [plain], [exact], slack=2, dtype=torch.bfloat16)
        gradients(model)


@pytest.mark.parametrize("four_bit", [False, True])
def test_several_adapters_and_one_that_stays_frozen(four_bit, tmp_path):
    model = base("mixtral", four_bit)
    start = logits(model)
    rw.add_adapter(model, config("both", init_lora_weights=False), name="one")
    one = logits(model)
    rw.save_adapter(model, tmp_path)
    rw.add_adapter(model, config("second", init_lora_weights=False), name="two")
    two = logits(model)
    rw.set_adapter(model, "one")
    torch.testing.assert_close(logits(model), one, rtol=0, atol=0)
    rw.remove_adapter(model, "one")
    torch.testing.assert_close(logits(model), two, rtol=0, atol=0)
    rw.remove_adapter(model, "two")
    torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    report = rw.load_adapter(model, tmp_path, trainable=False)
    assert report.trainable_parameters == 0
    torch.testing.assert_close(logits(model), one, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_merged_model_is_saved_whole(family, tmp_path):
    model = base(family)
    rw.add_adapter(model, config("both", init_lora_weights=False))
    rw.merge_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "merged")), logits(model))


def test_casting_the_model_leaves_the_experts_adapters_in_float32():
    model = base("mixtral")
    rw.add_adapter(model, config("both"))
    model.bfloat16()
    assert {parameter.dtype for parameter in rw.adapter_parameters(model).values()} == {torch.float32}
    step(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"RW101.*use_dora is set with target_parameters"),
        ({"lora_dropout": 0.1}, r"RW101.*lora_dropout is 0.1 with target_parameters"),
        ({"target_parameters": "down_proj"}, r"RW101.*'str' instances are not allowed as a Sequence"),
        ({"target_parameters": [], "target_modules": []}, r"RW101.*target_modules is empty"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["mlp.expert.down_proj"]}, r"RW401.*mlp\.experts\.gate_up_proj"),
        ({"target_parameters": [*BOTH, "w1"]}, r"RW401.*'w1'"),
        ({"target_parameters": ["gate.weight"]}, r"RW419.*layers\.0\.mlp\.gate\.weight \(and 1 more\).*target_modules"),
        ({"modules_to_save": ["mlp"]}, r"RW419.*modules_to_save trains model\.layers\.0\.mlp\.experts whole"),
        ({"target_modules": ["w1"]}, r"RW401.*target_modules"),
    ],
)
def test_targets_that_cannot_be(settings, message):
    model = base("mixtral")
    with pytest.raises(AdapterError, match=message):
        rw.add_adapter(model, config(**settings))
    assert not [module for module in model.modules() if isinstance(module, adapted.AdaptedExperts)]


def test_a_model_without_experts():
    with pytest.raises(AdapterError, match=r"RW401.*no stacked experts"):
        rw.add_adapter(tiny_llama(), config("both"))


def test_experts_of_a_layout_of_their_own_are_refused():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4TextConfig(vocab_size=97, **sizes, **heads))
    with pytest.raises(AdapterError, match=r"RW419.*Llama4TextExperts does not use"):
        rw.add_adapter(model, config(target_parameters=["experts.down_proj"]))


def test_experts_without_a_gate():
    """Nemotron-H multiplies up, then down."""
    from torch.nn import functional as F
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_gate=False)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = 4, F.relu
            self.down_proj = nn.Parameter(torch.randn(4, 32, 48))
            self.up_proj = nn.Parameter(torch.randn(4, 48, 32))

        def forward(self, hidden_states, top_k_index, top_k_weights): ...

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts(tiny_moe("mixtral").config)

    block = Block()
    x, index, weights = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    before = block.experts(x, index, weights)
    settings = config(target_parameters=["experts.up_proj", "experts.down_proj"], init_lora_weights=False)
    rw.add_adapter(block, settings)
    after = block.experts(x, index, weights)
    assert not torch.allclose(after, before, atol=1e-2)
    rw.merge_adapter(block)
    torch.testing.assert_close(block.experts(x, index, weights), after, rtol=1e-4, atol=1e-3)


def test_hooks_on_the_experts_are_called_once_whatever_is_at_work():
    model, calls = base("mixtral"), []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_hook(lambda *_: calls.append("before"))
    rw.add_adapter(model, config("both"))
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: calls.append("after"))
    for way in (rw.disable_adapter, rw.enable_adapter, rw.merge_adapter, rw.unmerge_adapter, rw.remove_adapter):
        way(model)
        calls.clear()
        logits(model)
        assert calls == ["before", "after"], way.__name__
    handle.remove()
    calls.clear()
    logits(model)
    assert calls == ["after"]


MIXTURES = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "gpt_oss": {},
    "olmoe": {"intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {},
}


@thinned({"family": list(MIXTURES), "four_bit": [False, True]})
def test_all_linear_says_what_it_leaves_out_and_what_reaches_it(family, four_bit):
    def mixture():
        model = tiny_moe(family, **MIXTURES[family])
        if four_bit:
            rw.quantize(model, rw.Nf4Config(block_size=32))
        return model

    model = mixture()
    total = sum(item.numel() for item in tiny_moe(family, **MIXTURES[family]).parameters())
    with pytest.warns(RankwiseWarning, match="RW422.*--target-parameters") as caught:
        report = rw.add_adapter(model, rw.LoraConfig(r=2))
    (said,) = [str(item.message) for item in caught if isinstance(item.message, RankwiseWarning)]
    stacks = [name for name, item in tiny_moe(family, **MIXTURES[family]).named_parameters() if item.dim() == 3]
    experts = sum(item.numel() for item in tiny_moe(family, **MIXTURES[family]).parameters() if item.dim() == 3)
    assert f"{experts:,} of the model's {total:,} parameters ({100 * experts / total:.1f} %)" in said
    assert report.left_out is not None
    assert f"--target-parameters {','.join(report.left_out.target_parameters)}" in str(report)

    model = mixture()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankwiseWarning)
        report = rw.add_adapter(model, rw.LoraConfig(r=2, target_parameters=report.left_out.target_parameters))
    assert report.left_out is None
    assert {item.name for item in report.modules if item.experts} == set(stacks)
    step(model)


def test_experts_that_train_or_that_nothing_reaches():
    model = tiny_moe("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankwiseWarning)
        chosen = rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[BOTH[1]]))
        whole = rw.add_adapter(tiny_moe("mixtral"), rw.LoraConfig(r=2, modules_to_save=["experts"]))
    assert set(chosen.left_out.target_parameters) == {BOTH[1], "mlp.experts.gate_up_proj"}
    assert whole.left_out is None
    llama4 = {"intermediate_size": 16, "intermediate_size_mlp": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    foreign = tiny_moe("llama4_text", **llama4, interleave_moe_layer_step=1)
    with pytest.warns(RankwiseWarning, match="RW422.*their forward is not the one that adapters support"):
        rw.add_adapter(foreign, rw.LoraConfig(r=2))


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("deepseek_v2", {"use_dora": True}, "gate_proj, up_proj, down_proj"),
        ("deepseek_v2", {"target_modules": r".*shared_experts\.(up|down)_proj"}, "up_proj, down_proj"),
        ("deepseek_v2", {"target_modules": ["q_proj", "o_proj"]}, None),
        ("mixtral", {"target_parameters": BOTH}, None),
    ],
)
def test_adapters_that_peft_would_put_on_the_experts_are_said_and_others_load_there(family, settings, named, tmp_path):
    model = tiny_moe(family, **MIXTURES[family])
    base = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankwiseWarning)
        rw.add_adapter(model, rw.LoraConfig(r=2, **settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path)
    told = [item.message.message for item in caught if getattr(item.message, "code", None) == "RW559"]
    assert len(told) == (named is not None)
    if named:
        assert f"target_modules {named} for the stacked experts" in told[0]
        assert f"--exclude-modules {named.replace(', ', ',')}." in told[0]
    else:
        theirs = pytest.importorskip("peft").PeftModel.from_pretrained(base, str(tmp_path))
        assert torch.allclose(logits(theirs.eval()), logits(model.eval()), atol=1e-6)
