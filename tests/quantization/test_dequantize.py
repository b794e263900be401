"""Back from 4 bits: the layers that were there before, saveable, and ready to be quantized again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise.errors import QuantizationError
from rankwise.quantization import Linear4bit, Nf4Config, adopt_bitsandbytes_config, dequantize, quantize
from tiny_models import tiny_gpt2, tiny_llama

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
BASES = {"llama": (tiny_llama, nn.Linear), "gpt2": (lambda: tiny_gpt2(n_embd=64), Conv1D)}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def quantized(base: str, config: Nf4Config | None = None) -> nn.Module:
    model = BASES[base][0]()
    quantize(model, config or Nf4Config())
    return model


def reload(folder: Path) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    adopt_bitsandbytes_config(config)
    return AutoModelForCausalLM.from_pretrained(folder, config=config)


def target_layers(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.endswith(("_proj", "c_attn", "c_fc"))]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", ["in memory", "while loading", "from 4 bits on disk"])
def test_dequantized_and_saved_it_is_the_same_model(base, way, tmp_path):
    if way == "in memory":
        model = quantized(base)
    elif way == "while loading":
        BASES[base][0]().save_pretrained(tmp_path / "dense")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=Nf4Config())
    else:
        quantized(base).save_pretrained(tmp_path / "packed")
        model = reload(tmp_path / "packed")
    shapes = {name: tuple(t.shape) for name, t in BASES[base][0]().state_dict().items()}
    model = model.dequantize()
    assert {type(layer) for layer in target_layers(model)} == {BASES[base][1]}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(again), logits(quantized(base)), rtol=1e-4, atol=1e-4)


def test_a_dense_layer_of_another_weight_keeps_the_bias():
    conv = Conv1D(6, 64)
    nn.init.normal_(conv.bias)
    W = torch.randn(6, 64, dtype=torch.bfloat16)
    dense = Linear4bit.from_linear(conv).eval().dense_layer(W)
    assert type(dense) is Conv1D
    assert torch.equal(dense.weight, W.T)
    assert torch.equal(dense.bias, conv.bias.bfloat16())
    assert not dense.training
    assert not any(parameter.requires_grad for parameter in dense.parameters())
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert dense(x).shape == (2, 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_the_dtype_may_be_named(dtype):
    model = quantized("llama")
    assert dequantize(model, dtype) == 14
    assert {layer.weight.dtype for layer in target_layers(model)} == {torch.bfloat16}
    with pytest.raises(QuantizationError, match=r"RW605.*'float33'"):
        dequantize(quantized("llama"), "float33")


def test_after_saving_it_still_dequantizes(tmp_path):
    model = quantized("llama")
    model.save_pretrained(tmp_path)
    before = logits(model)
    torch.testing.assert_close(logits(model.dequantize()), before, rtol=1e-4, atol=1e-4)


def test_a_layer_at_two_places_stays_one_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model.add_module("again", model[0])
    quantize(model, Nf4Config())
    assert dequantize(model) == 1
    assert type(model.again) is nn.Linear
    assert model.again is model[0]


def test_what_was_4_bit_once_can_be_quantized_again(tmp_path):
    model = quantized("llama")
    rw.add_adapter(model, rw.LoraConfig(r=2))
    with pytest.raises(QuantizationError, match="RW610.*adapters"):
        quantize(model, Nf4Config())
    rw.merge_adapter(model, reversible=False)
    model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert quantize(model, Nf4Config(block_size=32)).layers
    with pytest.raises(QuantizationError, match="RW610.*already"):
        quantize(model, Nf4Config())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(reload(tmp_path / "again")), logits(model))


def test_a_removed_adapter_is_no_reason_to_refuse():
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=2))
    rw.remove_adapter(model)
    assert quantize(model, Nf4Config()).layers


def test_saving_while_merged_does_not_spoil_the_next_save(tmp_path):
    model = quantized("llama", Nf4Config(double_quant=True))
    before = logits(model)
    rw.add_adapter(model, rw.LoraConfig(r=2, init_lora_weights=False))
    rw.merge_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(model))
    rw.unmerge_adapter(model)
    rw.remove_adapter(model)
    model.save_pretrained(tmp_path / "packed")
    again = reload(tmp_path / "packed")
    assert isinstance(again.model.layers[0].mlp.up_proj, Linear4bit)
    assert torch.equal(logits(again), before)
