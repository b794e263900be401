"""Combining adapters gives the matrices that PEFT's ``add_weighted_adapter`` gives."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import rankwise as rw
from rankwise.cli.main import main
from rankwise.errors import AdapterError, ConfigError
from rankwise.evaluation.engine import template_of
from rankwise.records import RunRecord
from tiny_models import tiny_gpt2, tiny_llama, tiny_moe

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
ALIKE = ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 5})
CASES = {
    "linear": (ALIKE, {}),
    "cat": (({"r": 3, "target_modules": ["q_proj"]}, {"r": 5, "target_modules": ["q_proj", "up_proj"]}), {}),
    "svd": (({"r": 3}, {"r": 5, "use_rslora": True}), {"rank": 4}),
}


def folders(tmp_path, settings, make=tiny_llama):
    paths = []
    for index, own in enumerate(settings):
        model = make()
        rw.add_adapter(model, rw.LoraConfig(**{"r": 3, "init_lora_weights": False, **own}))
        paths.append(tmp_path / f"adapter{index}")
        rw.save_adapter(model, paths[-1], base_model=str(tmp_path / "base"))
    return paths


def by_peft(paths, weights, way, options, make=tiny_llama):
    model = peft.PeftModel.from_pretrained(make(), paths[0], adapter_name="a")
    model.load_adapter(paths[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], weights, "both", combination_type=way, svd_rank=options.get("rank"))
    model.set_adapter("both")
    return model


def ours(paths, weights, way, options, make=tiny_llama):
    model = make()
    for name, path in zip("ab", paths):
        rw.load_adapter(model, path, name=name, trainable=False)
    rw.combine_adapters(model, ["a", "b"], weights, name="both", combine=way, **options)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def every_other(p):
    """In place of torch.bernoulli: PEFT draws random numbers for the new adapter's matrices before."""
    return (torch.arange(p.numel()) % 2).view_as(p).to(p)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.5)])
@pytest.mark.parametrize("way", CASES)
def test_the_combination_is_peft_s(tmp_path, way, weights, monkeypatch):
    monkeypatch.setattr(torch, "bernoulli", every_other)
    settings, options = CASES[way]
    paths = folders(tmp_path, settings)
    model, theirs = ours(paths, weights, way, options), by_peft(paths, weights, way, options)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    if way == "svd":
        return
    # Of an SVD the signs are free.
    wanted = {key: value for key, value in theirs.named_parameters() if ".both." in key}
    found = rw.adapter_parameters(model)
    assert len(found) == len(wanted)
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key.replace(".weight", ".both.weight")], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["cat", "svd", "linear"])
def test_conv1d_and_embeddings_combine_too(tmp_path, way):
    settings = ({"target_modules": ["c_attn", "wte"]}, {"target_modules": ["c_attn", "c_proj"], "lora_alpha": 4})
    paths = folders(tmp_path, settings, tiny_gpt2)
    model = ours(paths, (0.7, 0.3), way, {}, tiny_gpt2)
    theirs = by_peft(paths, [0.7, 0.3], way, {}, tiny_gpt2)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)


def test_cat_is_the_weighted_sum_of_the_updates(tmp_path):
    paths = folders(tmp_path, CASES["cat"][0])
    model = ours(paths, (0.7, 0.3), "cat", {})
    W = tiny_llama().model.layers[0].self_attn.q_proj.weight
    sums = torch.zeros_like(W)
    for path, r, weight in zip(paths, (3, 5), (0.7, 0.3)):
        tensors = load_file(path / "adapter_model.safetensors")
        start = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        sums += weight * 32 / r * tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]
    rw.merge_adapter(model)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight - W, sums, rtol=1e-4, atol=1e-5)


def test_the_command_writes_the_same_adapter(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    paths = folders(tmp_path, CASES["cat"][0])
    chosen = ["--adapter", str(paths[0]), "--adapter", str(paths[1]), "--weights", "0.7,0.3", "--combine", "cat"]
    assert main(["merge", *chosen, "--output", str(tmp_path / "both"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["r"] == 8
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "both")
    torch.testing.assert_close(logits(loaded), logits(ours(paths, (0.7, 0.3), "cat", {})), rtol=1e-4, atol=1e-4)


def test_how_the_base_of_a_combination_is_loaded_is_said(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    paths = folders(tmp_path, CASES["cat"][0])
    for path in paths:
        base = {"base_model": str(tmp_path / "base"), "quantization": rw.Nf4Config().to_loading_dict()}
        record = RunRecord(method="qlora", seed=0, settings={"chat_template": "t.jinja"}, base_model=base)
        record.save(path)
        (path / "chat_template.jinja").write_text("{{ messages }}")
    given = [part for path in paths for part in ("--adapter", str(path))]
    assert main(["merge", *given, "--combine", "cat", "--output", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "chat_template.jinja").read_text() == "{{ messages }}"
    said = capsys.readouterr()
    assert "RW755" in said.err
    assert template_of([tmp_path / "both"]) == "{{ messages }}"
    base["quantization"] = rw.Fp4Config().to_loading_dict()
    RunRecord(method="qlora", seed=0, settings={}, base_model=base).save(paths[1])
    assert main(["merge", *given, "--combine", "cat", "--output", str(tmp_path / "mixed")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{paths[0]} over nf4, {paths[1]} over fp4" in said
    # The second run was given no template.
    assert "with different chat templates (give --chat-template)" in said
    assert not (tmp_path / "mixed" / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "RW112"),
        (["--combine", "linear", "--weights", "1"], "RW750"),
        (["--combine", "cat", "--rank", "2"], "RW750"),
        (["--combine", "linear"], "RW751"),
        (["--combine", "cat", "--verify"], "RW112"),
    ],
)
def test_what_makes_no_combination_is_refused(tmp_path, capsys, arguments, code):
    tiny_llama().save_pretrained(tmp_path / "base")
    paths = folders(tmp_path, CASES["cat"][0])
    given = [part for path in paths for part in ("--adapter", str(path))]
    assert main(["merge", *given, *arguments, "--output", str(tmp_path / "both"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    assert not (tmp_path / "both").exists()


def test_rows_without_a_measurement_are_refused(tmp_path, capsys):
    given = ["merge", "--adapter", str(tmp_path), "--data", "rows.jsonl", "--output", str(tmp_path / "new"), "--json"]
    assert main(given) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "RW112"
    assert "--verify" in error["message"]


def test_dora_and_experts_are_never_dropped(tmp_path):
    model = tiny_llama()
    for name in "ab":
        rw.add_adapter(model, rw.LoraConfig(r=3, use_dora=name == "b"), name=name)
    with pytest.raises(AdapterError, match="RW751.*DoRA"):
        rw.combine_adapters(model, ["a", "b"], [0.5, 0.5])
    model = tiny_moe("qwen3_moe")
    rw.add_adapter(model, rw.LoraConfig(r=3, target_parameters=["mlp.experts.down_proj"]), name="a")
    with pytest.raises(AdapterError, match="RW751.*experts"):
        rw.combine_adapters(model, ["a"], [0.5])
    with pytest.raises(ConfigError, match="RW750"):
        rw.combine_adapters(model, ["a"], [0.5], combine="mean")
