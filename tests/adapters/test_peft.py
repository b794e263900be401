"""Adapters written by us load in PEFT, and PEFT's in ours, with equal logits."""

from __future__ import annotations

import json

import pytest
import torch
from adapted_models import IDS, assert_peft_reads, logits, read_from_peft, step

import rankwise as rw
from tiny_models import tiny_gpt2, tiny_llama

peft = pytest.importorskip("peft", reason="PEFT is the oracle here; install the extra `bench`")

LLAMA = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 5},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
        "alpha_pattern": {"up_proj": 3},
    },
    "whole_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias_all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias_lora_only": {"target_modules": ["q_proj"], "bias": "lora_only", "use_dora": True},
    "regex": {"target_modules": r".*layers\.1\..*_proj"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "layers_and_a_whole_name": {
        "target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"],
        "layers_to_transform": [0],
    },
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "all_linear": {"target_modules": "all-linear", "use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
}
GPT2 = {
    "lora": {"target_modules": ["c_attn", "c_fc"]},
    "dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
}
CASES = [("llama", LLAMA[name]) for name in LLAMA] + [("gpt2", GPT2[name]) for name in GPT2]
CASE_IDS = [f"llama-{name}" for name in LLAMA] + [f"gpt2-{name}" for name in GPT2]


def base(family: str) -> torch.nn.Module:
    return tiny_llama(attention_bias=True) if family == "llama" else tiny_gpt2()


@pytest.mark.parametrize(("family", "settings"), CASES, ids=CASE_IDS)
def test_ours_in_peft(family, settings, tmp_path):
    model = base(family)
    rw.add_adapter(model, rw.LoraConfig(**{"r": 3, "lora_alpha": 8, **settings}))
    step(model)
    assert_peft_reads(model, lambda: base(family), peft, tmp_path)


@pytest.mark.parametrize(("family", "settings"), CASES, ids=CASE_IDS)
def test_peft_in_ours(family, settings, tmp_path):
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 8, "init_lora_weights": False, **settings}, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base(family), config)
    step(theirs, rate=0.05)
    model = read_from_peft(theirs, lambda: base(family), tmp_path)
    rw.save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base(family), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], r".*(q_proj|embed_tokens)"], ids=["names", "regex"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_that_peft_adapts_as_its_embedding(targets, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_llama(tie_word_embeddings=True), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = tiny_llama(tie_word_embeddings=True)
    assert "lm_head" in [item.name for item in rw.load_adapter(ours, tmp_path).modules]
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_partly_adapted_fused_projection_in_peft(use_dora, use_rslora, tmp_path):
    model = tiny_gpt2()
    frozen_k = model.transformer.h[0].attn.c_attn.weight[:, 32:64].clone()
    rw.add_adapter(
        model,
        rw.LoraConfig(
            r=3,
            lora_alpha=8,
            target_modules=["c_attn", "c_fc"],
            enable_lora={"c_attn": [True, False, True]},
            use_dora=use_dora,
            use_rslora=use_rslora,
        ),
    )
    step(model)
    rw.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    ours = tiny_gpt2()
    rw.load_adapter(ours, tmp_path)
    assert rw.adapter_config(ours).enable_lora == {"c_attn": (True, False, True)}
    assert rw.adapter_config(ours).r == 3
    assert not rw.adapter_config(ours).rank_pattern
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=0)
    rw.merge_adapter(ours)
    assert torch.equal(ours.transformer.h[0].attn.c_attn.weight[:, 32:64], frozen_k)


def test_gradients_and_losses_equal_pefts_over_fifty_steps(tmp_path):
    for settings in ({"target_modules": "all-linear"}, {"target_modules": "all-linear", "use_dora": True}):
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, lora_alpha=8, **settings))
        theirs.save_pretrained(tmp_path)
        model = tiny_llama()
        rw.load_adapter(model, tmp_path)
        curves = [_train(each, steps=50) for each in (model, theirs)]
        torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=0)
        assert curves[0][-1] < curves[0][0] - 0.5


def _train(model: torch.nn.Module, steps: int) -> torch.Tensor:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensor(losses)


def test_transformers_loads_our_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    # LoRA: transformers 5.24 itself reads no DoRA magnitude from a PEFT folder, PEFT's own included.
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    rw.add_adapter(model, rw.LoraConfig(r=3))
    step(model)
    rw.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_the_config_file_is_pefts(tmp_path):
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=3, lora_alpha=8))
    rw.save_adapter(model, tmp_path, base_model="some/base")
    text = (tmp_path / "adapter_config.json").read_text()
    document = json.loads(text)
    assert text == json.dumps(document, indent=2, sort_keys=True) + "\n"
    assert document["inference_mode"] is True
    assert document["base_model_name_or_path"] == "some/base"
    assert document["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert set(document) <= set(peft.LoraConfig().to_dict())


def test_an_adapter_from_the_wild(shared):
    from rankwise.adapters.peft_config import from_peft, read_config

    folder = shared / "adapters" / "smollm-135m-lora-r16-qv_5epochs"
    config = from_peft(read_config(folder), folder)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert sorted(config.target_modules) == ["q_proj", "v_proj"]
