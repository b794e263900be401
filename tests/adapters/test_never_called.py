"""Layers that a model's forward never calls with text get no adapter, and a warning says so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rankwise as rw
from rankwise.errors import RankwiseWarning

TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 64}
BART = {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 24, "decoder_attention_heads": 2}
PROPHETNET = {
    "hidden_size": 16,
    "num_decoder_layers": 1,
    "decoder_ffn_dim": 24,
    "num_decoder_attention_heads": 2,
    "num_encoder_attention_heads": 2,
}
FAMILIES = {
    "Mamba": (MAMBA, "mixer.dt_proj"),
    "FalconMamba": (MAMBA, "mixer.dt_proj"),
    "Bart": (BART, "encoder_attn.k_proj"),
    "ProphetNet": (PROPHETNET, "cross_attn.key_proj"),
}


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TOKENS, **FAMILIES[family][0])
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_never_called_is_left_out(family: str, tmp_path: Path) -> None:
    model, idle = tiny(family), FAMILIES[family][1]
    with pytest.warns(RankwiseWarning, match=rf"RW177.*{idle}"):
        names = [item.name for item in rw.add_adapter(model, rw.LoraConfig(r=2, init_lora_weights=False)).modules]
    assert names
    ids = torch.tensor([[1, 5, 6, 7, 8, 2]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert [key for key, value in rw.adapter_parameters(model).items() if value.grad is None] == []
    rw.save_adapter(model, tmp_path)
    assert [item.name for item in rw.load_adapter(tiny(family), tmp_path).modules] == names


def test_a_whole_name_still_chooses_it() -> None:
    model = tiny("Mamba")
    name = next(name for name, _ in model.named_modules() if name.endswith("dt_proj"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankwiseWarning)
        report = rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=[name]))
    assert [item.name for item in report.modules] == [name]


def test_a_quantized_layer_is_called_and_adapted() -> None:
    model = tiny("FalconMamba")
    rw.quantize(model, rw.Nf4Config())
    names = [item.name for item in rw.add_adapter(model, rw.LoraConfig(r=2, init_lora_weights=False)).modules]
    assert any(name.endswith("dt_proj") for name in names)
    ids = torch.tensor([[1, 5, 6, 7, 8, 2]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert [key for key, value in rw.adapter_parameters(model).items() if value.grad is None] == []
