"""Adapters written by us load in PEFT, and PEFT's in ours, with equal logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import IDS, logits, read_from_peft, step
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PhiConfig,
    PhiForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

import rankwise as rw
from rankwise.errors import AdapterError, ConfigError
from rankwise.export.merged import merge_to_folder
from rankwise.lora_config import FIXED_FIELDS
from tiny_models import tiny_gpt2, tiny_llama, tiny_moe

peft = pytest.importorskip("peft", reason="PEFT is the oracle here; install the extra `bench`")


def test_a_module_trained_whole_beside_all_biases(tmp_path):
    """PEFT's file holds the bias of the module three times."""
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], modules_to_save=["ln_2"], bias="all", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_gpt2(), config)
    step(theirs, rate=0.05)
    read_from_peft(theirs, tiny_gpt2, tmp_path)


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
    from rankwise.adapters.folder import from_peft, read_config

    folder = shared / "adapters" / "smollm-135m-lora-r16-qv_5epochs"
    config = from_peft(read_config(folder), folder)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert sorted(config.target_modules) == ["q_proj", "v_proj"]


# What PEFT writes beside the pairs: embeddings and heads, also of other sizes, with biases and scales of their own.
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}


def made(kind: Any, config: Any, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind(config(vocab_size=97, **sizes)).eval()

    return make


BASES: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "padded": lambda: tiny_llama(vocab_size=104, tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "gemma": made(Gemma3ForCausalLM, Gemma3TextConfig, num_key_value_heads=2, head_dim=8, **SIZES),
    "phi": made(PhiForCausalLM, PhiConfig, **SIZES),
    "biogpt": made(BioGptForCausalLM, BioGptConfig, **SIZES),
    "bart": made(BartForCausalLM, BartConfig, scale_embedding=True, **BART),
    "xglm": made(XGLMForCausalLM, XGLMConfig, **XGLM),
}
ENDS = ["q_proj", "embed_tokens", "lm_head"]
# Base, number of tokens of the adapter's base, settings. A DoRA of an end is stored under two names.
STORED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ends": ("llama", 97, {}),
    "added tokens": ("llama", 101, {}),
    "added tokens, tied": ("tied", 101, {}),
    "added tokens, scaled": ("gemma", 101, {}),
    "added tokens, biased head": ("phi", 101, {}),
    "fewer tokens": ("padded", 97, {}),
    "added tokens that train whole": ("llama", 101, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "added tokens that train whole, tied": ("tied", 101, {"modules_to_save": ["embed_tokens"]}),
    "added tokens whose rows train": ("llama", 101, {"trainable_token_indices": [98, 99]}),
    "added tokens whose rows train, tied": ("tied", 101, {"trainable_token_indices": [98, 99]}),
    "adapted ends of added tokens": ("llama", 101, {"target_modules": ENDS}),
    "adapted biased head": ("phi", 97, {"target_modules": ENDS, "use_dora": True}),
    "adapted embedding": ("gpt2", 97, {"target_modules": ["c_attn", "wte"], "use_dora": True}),
}
PLAIN: dict[str, tuple[str, int, dict[str, Any]]] = {
    "rows of both ends": ("llama", 97, {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 96]}}),
    "rows, tied": ("tied", 97, {"trainable_token_indices": [5, 9]}),
    "rows of wte": ("gpt2", 97, {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [5, 9]}}),
    "any ending": ("llama", 97, {"modules_to_save": ["norm"]}),
    "scaled embedding trained whole": ("gemma", 97, {"modules_to_save": ["embed_tokens"]}),
    **{
        f"{base} {kind}": (base, 97, settings)
        for base in ("gemma", "biogpt", "bart", "xglm")
        for kind, settings in {
            "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
            "embedding dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
            "rows": {"trainable_token_indices": [5, 9]},
        }.items()
    },
}


def grown(base: str, tokens: int) -> Any:
    model = BASES[base]()
    torch.manual_seed(3)
    if tokens != model.config.vocab_size:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def trained_by_peft(base: str, tokens: int, settings: dict[str, Any]) -> Any:
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 8, "target_modules": ["q_proj"], **settings})
    model = peft.get_peft_model(grown(base, tokens), config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("case", [*STORED, *PLAIN])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_computes_the_same_here_saved_again_and_merged(case: str, tmp_path: Path) -> None:
    base, tokens, settings = (STORED | PLAIN)[case]
    theirs = trained_by_peft(base, tokens, settings)
    theirs.save_pretrained(tmp_path, save_embedding_layers=case in STORED)
    expected = logits(theirs)
    model = BASES[base]()
    rw.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=2e-5)
    rw.save_adapter(model, tmp_path / "again")
    ours = BASES[base]()
    rw.load_adapter(ours, tmp_path / "again")
    # An embedding that differs from the base's in its size alone is not stored again.
    torch.testing.assert_close(logits(ours)[..., :tokens], expected, rtol=1e-5, atol=2e-5)
    again = peft.PeftModel.from_pretrained(grown(base, tokens), tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=2e-5)
    rw.merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", ["added tokens, tied", "fewer tokens", "adapted biased head", "any ending"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_merges_into_a_folder(case: str, tmp_path: Path) -> None:
    base, tokens, settings = (STORED | PLAIN)[case]
    theirs = trained_by_peft(base, tokens, settings)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=case in STORED)
    BASES[base]().save_pretrained(tmp_path / "base")
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged", model=str(tmp_path / "base"))
    merged, _ = rw.load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_read_is_refused_with_its_reason(tmp_path: Path) -> None:
    # The file holds the embedding alone, so that nobody knows the head's new rows.
    theirs = trained_by_peft("llama", 101, {"target_modules": ["embed_tokens"]})
    theirs.save_pretrained(tmp_path / "half", save_embedding_layers=True)
    with pytest.raises(AdapterError, match=r"RW411.*\(3, 101\).*its embedding and head resized"):
        rw.load_adapter(tiny_llama(), tmp_path / "half")
    # PEFT's all-linear names the router's weight in target_parameters.
    router = peft.get_peft_model(tiny_moe("mixtral"), peft.LoraConfig(r=2, target_modules="all-linear"))
    router.save_pretrained(tmp_path / "router")
    with pytest.raises(AdapterError, match=r"RW419.*mlp\.gate\.weight.*MixtralTopKRouter.*in PEFT"):
        rw.load_adapter(tiny_moe("mixtral"), tmp_path / "router")
    # Another adapter changes an end, which therefore cannot be resized.
    trained_by_peft("llama", 101, {}).save_pretrained(tmp_path / "stored", save_embedding_layers=True)
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(AdapterError, match=r"RW406.*101 tokens, the model has 97"):
        rw.load_adapter(model, tmp_path / "stored", name="second")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_padding_token_gets_pefts_gradient(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_llama(pad_token_id=5), peft.LoraConfig(r=3, **settings))
    theirs.save_pretrained(tmp_path)
    model = tiny_llama(pad_token_id=5)
    rw.load_adapter(model, tmp_path)
    for each in (model, theirs):
        each(input_ids=IDS, labels=IDS).loss.backward()
    expected = {key.replace(".default", ""): parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in rw.adapter_parameters(model).items():
        key = key if key in expected or "magnitude" not in key else f"{key}.weight"
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-7)


def test_what_is_trained_whole_is_stored_without_the_buffers_that_the_model_computes(tmp_path: Path) -> None:
    model = BASES["gemma"]()
    rw.add_adapter(model, rw.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    assert not [key for key in rw.adapters.adapter_tensors(model) if "embed_scale" in key]


def test_the_config_takes_every_field_that_peft_has() -> None:
    """PEFT's own description of a config makes the same config here."""
    theirs = peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM", revision="main")
    assert rw.LoraConfig(**theirs.to_dict()) == rw.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj"])


@pytest.mark.parametrize(
    "name",
    [*FIXED_FIELDS, "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_ga_config", "peft_type"],
)
def test_the_config_refuses_by_name_what_would_change_the_result(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"RW101: {name} is 'IA3', [^;]*; leave it out, or use PEFT\.$"):
        rw.LoraConfig(**{name: "IA3"})
