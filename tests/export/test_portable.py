"""Exported folders: PEFT gives our logits with each of them, and what a server would misread is gone."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.errors import AdapterError, ConfigError, RunError
from rankwise.export.adapter import ConversionRows, Wanted, export_file, export_live
from rankwise.export.converted import HeldOutRow, convert, update_of
from tables import thinned
from tiny_models import tiny_gpt2, tiny_llama, tiny_moe

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
CASES = {
    "lora": (tiny_llama, {}),
    "rslora": (tiny_llama, {"use_rslora": True, "lora_alpha": 7}),
    "patterns": (tiny_llama, {"rank_pattern": {"q_proj": 2, "k_proj": 5}, "alpha_pattern": {"v_proj": 3}}),
    "rslora_patterns": (
        tiny_llama,
        {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"o_proj": 9}},
    ),
    "some_layers": (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2": (tiny_gpt2, {}),
    "gpt2_fused": (tiny_gpt2, {"target_modules": ["c_attn"], "enable_lora": {"c_attn": [True, False, True]}}),
    "experts": (
        lambda: tiny_moe("qwen3_moe"),
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": {"q_proj": 5}},
    ),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(make, **settings):
    model = make()
    rw.add_adapter(model, rw.LoraConfig(**{"r": 3, "init_lora_weights": False, **settings}))
    return model


def by_peft(make, folder):
    return logits(peft.PeftModel.from_pretrained(make(), folder))


@thinned({"case": list(CASES), "target": ["vllm", "peft"]})
def test_peft_gives_our_logits_with_an_exported_folder(tmp_path, case, target):
    make, settings = CASES[case]
    model = adapted(make, **settings)
    # vLLM reads experts one by one.
    report = rw.export_adapter(model, tmp_path / "served", target="peft" if case == "experts" else target)
    assert report.conversion is None
    torch.testing.assert_close(by_peft(make, tmp_path / "served"), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(make()), atol=1e-2)


@pytest.mark.parametrize("case", ["rslora_patterns", "gpt2_fused"])
def test_every_scale_is_one_and_every_rank_the_same(tmp_path, case):
    make, settings = CASES[case]
    report = rw.export_adapter(adapted(make, **settings), tmp_path / "served", target="sglang")
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == report.r
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "served" / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {report.r}


def test_a_folder_is_exported_without_its_base_weights(tmp_path):
    from rankwise.adapters.checkpoint import read_adapter
    from rankwise.models import load_skeleton

    make, settings = CASES["rslora_patterns"]
    model = adapted(make, **settings)
    make().save_pretrained(tmp_path / "base")
    rw.save_adapter(model, tmp_path / "adapter")
    skeleton = load_skeleton(str(tmp_path / "base"))
    export_file(skeleton, read_adapter(skeleton, tmp_path / "adapter"), tmp_path / "served", Wanted("vllm", r=8))
    torch.testing.assert_close(by_peft(make, tmp_path / "served"), logits(model), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "served" / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize(
    ("settings", "target", "said"),
    [
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "vllm",
            "RW730.*more than pairs .lm_head.weight",
        ),
        ({"target_modules": ["q_proj"], "bias": "all"}, "peft", "RW730.*more than pairs .*proj.bias"),
        ({"r": 513, "target_modules": ["q_proj"]}, "vllm", "RW731"),
    ],
)
def test_what_a_server_refuses_is_refused(tmp_path, settings, target, said):
    model = adapted(lambda: tiny_llama(attention_bias=True), **settings)
    with pytest.raises(AdapterError, match=said):
        rw.export_adapter(model, tmp_path / "served", target=target)
    assert list(tmp_path.iterdir()) == []


def test_experts_are_refused_where_the_server_takes_none(tmp_path):
    make, settings = CASES["experts"]
    with pytest.raises(AdapterError, match="RW730.*experts"):
        rw.export_adapter(adapted(make, **settings), tmp_path / "served", target="sglang")


def test_vllm_gets_each_expert_as_its_linear_layers(tmp_path):
    """Gate, up and down of each expert, with the update of its part of the stack."""
    model = adapted(
        lambda: tiny_moe("qwen3_moe"), target_modules=["q_proj"], target_parameters=EXPERTS, r=3, lora_alpha=6
    )
    before = tiny_moe("qwen3_moe").model.layers
    rw.export_adapter(model, tmp_path / "served", target="vllm")
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    assert {"q_proj", "gate_proj", "up_proj", "down_proj"} <= set(config["target_modules"])
    tensors = load_file(tmp_path / "served" / "adapter_model.safetensors")
    rw.merge_adapter(model)
    after = model.model.layers
    for layer in (0, 1):
        old, new = before[layer].mlp.experts, after[layer].mlp.experts
        gate, up = (new.gate_up_proj - old.gate_up_proj).chunk(2, dim=1)
        for part, change in {"gate_proj": gate, "up_proj": up, "down_proj": new.down_proj - old.down_proj}.items():
            for index in range(8):
                start = f"base_model.model.model.layers.{layer}.mlp.experts.{index}.{part}"
                A, B = (tensors.pop(f"{start}.lora_{side}.weight") for side in "AB")
                torch.testing.assert_close(B @ A, change[index].detach(), rtol=1e-4, atol=1e-6)
    assert all("q_proj" in key for key in tensors)


@pytest.mark.parametrize(("family", "stacks"), [("qwen3_moe", EXPERTS[:1]), ("mixtral", EXPERTS)])
def test_experts_that_vllm_does_not_take_are_refused_by_name(tmp_path, family, stacks):
    model = adapted(lambda: tiny_moe(family), target_modules=["q_proj"], target_parameters=stacks)
    with pytest.raises(AdapterError, match=r"RW730.*layers.0.mlp.experts.gate_up_proj.*gate, up and down together"):
        rw.export_adapter(model, tmp_path / "served", target="vllm")


def test_nothing_is_overwritten_and_no_server_is_guessed(tmp_path):
    model = adapted(tiny_llama)
    rw.export_adapter(model, tmp_path / "served", target="vllm")
    with pytest.raises(RunError, match="RW532"):
        rw.export_adapter(model, tmp_path / "served", target="vllm")
    for given in ({"target": "vlm"}, {"target": "vllm", "rank": 0}, {"target": "vllm", "max_error": 0.0}):
        with pytest.raises(ConfigError, match="RW103|RW103"):
            rw.export_adapter(model, tmp_path / "other", **given)
    assert not (tmp_path / "other").exists()


def trained_dora(make=tiny_llama, **settings):
    """A DoRA adapter whose magnitudes have moved, each row's its own way, as far as the pair moves the weights."""
    model = adapted(make, use_dora=True, lora_alpha=0.1, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in rw.adapter_parameters(model).items():
            if "magnitude" in key:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    return model


def rows(count: int = 30, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (20,), generator=generator) for _ in range(count)]


DORA = {
    "llama": (tiny_llama, {}),
    "gpt2_fused": CASES["gpt2_fused"],
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("case", DORA)
def test_dora_at_full_rank_is_exact(tmp_path, case):
    make, settings = DORA[case]
    model = trained_dora(make, **settings)
    report = rw.export_adapter(model, tmp_path / "served", target="vllm", rank=96)
    assert report.conversion.error < 1e-3
    torch.testing.assert_close(by_peft(make, tmp_path / "served"), logits(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", [False, "pissa"])
def test_the_update_is_what_training_made_of_the_base_s_own_weights(init, use_dora):
    """PiSSA's first pairs, which the adapted layer lacks, included."""
    model = adapted(tiny_llama, init_lora_weights=init, use_dora=use_dora)
    with torch.no_grad():
        for parameter in rw.adapter_parameters(model).values():
            parameter.mul_(1.3)
    found = {path: update_of(m, "default") for path, m in model.named_modules() if type(m).__name__ == "AdaptedLayer"}
    rw.merge_adapter(model)
    base = tiny_llama()
    for path, dW in found.items():
        change = model.get_submodule(path).weight - base.get_submodule(path).weight
        torch.testing.assert_close(dW, change, rtol=1e-4, atol=1e-5)


def measured_error(model, folder, given) -> float:
    """sqrt(sum ||(dW' - dW) X||^2 / sum ||dW X||^2) from the file, with inputs caught anew."""
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = whole = 0.0
    layers = {path: m for path, m in model.named_modules() if type(m).__name__ == "AdaptedLayer"}
    caught = {path: [] for path in layers}
    for path, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, path=path: caught[path].append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for row in given:
            model(input_ids=row[None])
    for path, layer in layers.items():
        X = torch.cat(caught[path])
        dW = update_of(layer, "default")
        start = f"base_model.model.{path}.lora_"
        exported = tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]
        lost += float(((exported - dW) @ X.T).square().sum())
        whole += float((dW @ X.T).square().sum())
    return (lost / whole) ** 0.5


@pytest.mark.parametrize("held_out", [(), "others"])
def test_the_stated_error_is_that_of_rows_set_aside_and_its_rank_the_least(tmp_path, held_out):
    model = trained_dora()
    # Few rows to choose from, so that the error on others is larger.
    others = rows(5, seed=1)
    given = {"target": "vllm", "rows": rows(3), "held_out": others if held_out else ()}
    report = rw.export_adapter(model, tmp_path / "served", max_error=0.4, **given)
    measured = {
        name: measured_error(model, tmp_path / "served", those) for name, those in (("", rows(3)), ("o", others))
    }
    assert measured[""] < measured["o"]
    assert report.conversion.error == pytest.approx(measured["o" if held_out else ""], rel=1e-3)
    assert report.conversion.tokens == sum(map(len, others if held_out else rows(3)))
    assert report.conversion.error <= 0.4
    lower = rw.export_adapter(model, tmp_path / "lower", rank=report.conversion.least_r - 1, **given)
    assert lower.conversion.error > 0.4


def sharp_llama():
    """Its logits are large enough for losses to tell adapters apart."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(20)
    return model


def test_the_rank_grows_until_held_out_rows_are_as_likely(tmp_path, monkeypatch):
    # A --max-error of 0.2 allows four times as much.
    monkeypatch.setattr("rankwise.export.converted.PERPLEXITY_CHANGE", 2.5e-5)
    model = trained_dora(sharp_llama)
    held_out, given = rows(5, seed=1), {"target": "vllm", "max_error": 0.2, "rows": rows()}

    @torch.no_grad()
    def loss(model):
        return sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in held_out) / len(held_out)

    def change(folder):
        return abs(loss(peft.PeftModel.from_pretrained(sharp_llama(), folder)) - loss(model))

    report = rw.export_adapter(model, tmp_path / "served", held_out=held_out, **given)
    assert report.conversion.least_r < report.r == report.conversion.r
    rw.export_adapter(model, tmp_path / "least", rank=report.conversion.least_r, **given)
    assert change(tmp_path / "served") < 1e-4 < change(tmp_path / "least")
    assert report.likeness.perplexity_exported == pytest.approx(report.likeness.perplexity_adapter, rel=1e-4)
    with pytest.raises(AdapterError, match="RW732.*perplexity"):
        convert(model, "default", rows(), r=None, max_error=0.2, keeps=lambda pairs: False)


def test_the_inputs_choose_better_directions_than_the_weights(tmp_path):
    # Inputs of few directions: half of the tokens never come.
    given = [row % 12 + 3 for row in rows()]
    model = trained_dora()
    layer = model.model.layers[0].self_attn.q_proj
    weighed, _ = convert(model, "default", given, r=4, max_error=None)
    plain, _ = convert(model, "default", [], r=4, max_error=None)
    X = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.cat(given)))
    dW = update_of(layer, "default")
    name = "model.layers.0.self_attn.q_proj"
    errors = [float(((pair.B @ pair.A - dW) @ X.T).norm()) for pair in (weighed[name], plain[name])]
    assert errors[0] < 0.9 * errors[1]


def test_an_error_that_no_rank_keeps_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="RW732.*--data"):
        rw.export_adapter(trained_dora(), tmp_path / "served", target="vllm", rank=2, max_error=0.01)
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_sees_what_the_conversion_lost(tmp_path):
    model = trained_dora()
    held_out = [HeldOutRow(row, row) for row in rows(5, seed=1)]
    given = ConversionRows(rows(), held_out)
    coarse = export_live(model, tmp_path / "coarse", Wanted("vllm", r=1), given).likeness
    fine = export_live(model, tmp_path / "fine", Wanted("vllm", r=32), given).likeness
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "coarse")
        losses = [theirs(input_ids=row.ids[None], labels=row.ids[None]).loss for row in held_out]
    assert coarse.perplexity_exported == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)
    assert fine.difference < 0.1 * coarse.difference
    assert fine.perplexity_exported == pytest.approx(fine.perplexity_adapter, rel=1e-3)
    assert fine.perplexity_base != pytest.approx(fine.perplexity_adapter, rel=1e-5)
    # The model is as it was, the adapter at work.
    assert list(model.rankwise_adapters.configs) == ["default"]


def test_a_lower_rank_of_lora_is_converted_too(tmp_path):
    model = adapted(tiny_llama)
    report = rw.export_adapter(model, tmp_path / "served", target="vllm", rank=2, rows=rows())
    assert report.r == 2
    assert 0 < report.conversion.error < 1
    exported = AutoModelForCausalLM.from_config(tiny_llama().config)
    exported.load_state_dict(tiny_llama().state_dict())
    rw.load_adapter(exported, tmp_path / "served")
    assert not torch.allclose(logits(exported), logits(model), atol=1e-3)
