"""Checkpoints to and from bitsandbytes, with bitsandbytes itself as the judge."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import rankwise as rw
from precision import assert_as_exact
from rankwise.errors import QuantizationError
from rankwise.quantization import (
    Fp4Config,
    Linear4bit,
    Nf4Config,
    adopt_bitsandbytes_config,
    dequantize,
    quantize,
    rewrite_bitsandbytes_config,
)
from tables import thinned
from tiny_models import tiny_gpt2, tiny_llama

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
# Every `in` is a multiple of 64: bitsandbytes dequantizes others wrongly on a CPU.
BUILD = {
    "llama": lambda: tiny_llama(hidden_size=64, intermediate_size=128, attention_bias=True),
    "tied": lambda: tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(n_embd=64),
}
KINDS = [(quant_type, double) for quant_type in ("nf4", "fp4") for double in (False, True)]


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nothing to compare with")


def ours(quant_type: str, double: bool, **settings) -> Nf4Config | Fp4Config:
    return {"nf4": Nf4Config, "fp4": Fp4Config}[quant_type](double_quant=double, **settings)


def theirs(quant_type: str, double: bool, **settings) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double, **settings
    )


def load_ours(folder: Path, **settings) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    assert adopt_bitsandbytes_config(config) is not None
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **settings)


def logits(model: nn.Module) -> torch.Tensor:
    # With gradients: bitsandbytes repacks the weight in evaluation without them, and computes something else.
    return model(input_ids=IDS).logits.detach()


def files_equal(a: Path, b: Path) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@thinned({"base": list(BUILD), "dtype": [torch.float32, torch.bfloat16], "quant_type,double": KINDS})
def test_both_write_the_same_file_and_read_each_other(bnb, base, dtype, quant_type, double, tmp_path):
    BUILD[base]().to(dtype).save_pretrained(tmp_path / "dense")
    settings = {"dtype": dtype, "device_map": {"": "cpu"}}
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=theirs(quant_type, double, bnb_4bit_compute_dtype=dtype), **settings
    )
    mine = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=ours(quant_type, double), **settings
    )
    peer.save_pretrained(tmp_path / "peer")
    mine.save_pretrained(tmp_path / "mine")
    assert files_equal(tmp_path / "peer", tmp_path / "mine")

    read_by_peer = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", device_map={"": "cpu"})
    read_by_us = load_ours(tmp_path / "peer")
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in read_by_peer.modules())
    layers = [name for name, module in read_by_us.named_modules() if isinstance(module, Linear4bit)]
    assert layers == [name for name, module in mine.named_modules() if isinstance(module, Linear4bit)]
    for name in layers:
        weight = peer.get_submodule(name).weight
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(read_by_us.get_submodule(name).dequantize(), expected)
        assert torch.equal(mine.get_submodule(name).dequantize(), expected)
    assert torch.equal(logits(read_by_us), logits(mine))
    # nn.Module's own methods: transformers refuses them for a quantized model.
    dense = nn.Module.float(copy.deepcopy(mine))
    dequantize(dense)
    exact = logits(nn.Module.double(dense))
    assert_as_exact([logits(mine)] * 2, [logits(peer), logits(read_by_peer)], [exact] * 2)


def test_ragged_rows_are_right_where_bitsandbytes_is_wrong(bnb, tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=88)
    peer = bnb.nn.Params4bit(
        model.model.layers[0].mlp.down_proj.weight.data, quant_type="nf4", compress_statistics=False
    ).to("cpu")
    report = quantize(model, Nf4Config())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(stored[name], peer.data)
    assert torch.equal(stored[f"{name}.absmax"], peer.quant_state.absmax)
    again = load_ours(tmp_path)
    assert torch.equal(logits(again), logits(model))
    dense = tiny_llama(hidden_size=64, intermediate_size=88)
    for name in report.layers:
        # Half of the widest step between codes (0.152 for NF4), times the largest scale.
        W = dense.get_submodule(name).weight
        assert (again.get_submodule(name).dequantize() - W).abs().max() < 0.16 * W.abs().max()


def test_our_own_block_sizes_and_exclusions_come_back(tmp_path):
    model = BUILD["llama"]()
    quantize(model, Nf4Config(block_size=256, modules_to_not_convert=["down_proj"]))
    model.save_pretrained(tmp_path)
    again = load_ours(tmp_path)
    assert again.model.layers[0].mlp.up_proj.block_size == 256
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert files_equal(tmp_path, tmp_path / "again")


def test_a_quantized_head_is_read_as_the_file_has_it(bnb, tmp_path):
    BUILD["llama"]().save_pretrained(tmp_path / "dense")
    config = theirs("nf4", False, llm_int8_skip_modules=["k_proj"])
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, device_map={"": "cpu"})
    assert isinstance(peer.lm_head, bnb.nn.Linear4bit)
    peer.save_pretrained(tmp_path / "peer")
    model = load_ours(tmp_path / "peer")
    assert isinstance(model.lm_head, Linear4bit)
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    torch.testing.assert_close(logits(model), logits(peer), rtol=1e-5, atol=1e-5)


def test_other_storage_dtypes_are_read(bnb, tmp_path):
    BUILD["llama"]().save_pretrained(tmp_path / "dense")
    config = theirs("nf4", True, bnb_4bit_quant_storage="bfloat16")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, device_map={"": "cpu"})
    peer.save_pretrained(tmp_path / "peer")
    stored = load_file(tmp_path / "peer" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(logits(load_ours(tmp_path / "peer")), logits(peer), rtol=1e-5, atol=1e-5)


def test_the_compute_dtype_of_the_file_is_used(tmp_path):
    BUILD["llama"]().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=Nf4Config(compute_dtype=torch.float32)
    )
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["bnb_4bit_compute_dtype"] == "float32"
    again = load_ours(tmp_path)
    assert again.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


def test_another_dtype_can_be_asked_for(tmp_path):
    model = BUILD["llama"]()
    quantize(model, Nf4Config())
    model.save_pretrained(tmp_path)
    again = load_ours(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in again.parameters()} == {torch.bfloat16, torch.uint8}
    assert again.model.layers[0].mlp.up_proj.dtype == torch.bfloat16
    assert again.model.layers[0].mlp.up_proj.absmax.dtype == torch.float32


def test_shards_may_part_a_weight_from_its_scales(tmp_path):
    model = BUILD["llama"]()
    quantize(model, Nf4Config(double_quant=True))
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    weights = [name for name in index if name.endswith("_proj.weight")]
    assert any(index[name] != index[f"{name}.absmax"] for name in weights)
    assert torch.equal(logits(load_ours(tmp_path)), logits(model))


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path):
    model = BUILD["llama"]()
    quantize(model, Nf4Config())
    rw.add_adapter(model, rw.LoraConfig(target_modules="all-linear"))
    rw.merge_adapter(model, reversible=False)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_partly_merged_model_says_which_layers_are_dense(bnb, tmp_path):
    model = BUILD["llama"]()
    quantize(model, Nf4Config())
    rw.add_adapter(model, rw.LoraConfig(target_modules=["q_proj"]))
    rw.merge_adapter(model, reversible=False)
    model.save_pretrained(tmp_path)
    skipped = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert set(skipped) == {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
    assert torch.equal(logits(load_ours(tmp_path)), logits(model))
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(logits(peer), logits(model), rtol=1e-5, atol=1e-5)


def test_a_model_without_its_adapter_writes_its_base_under_the_old_names(tmp_path):
    model = BUILD["llama"]()
    quantize(model, Nf4Config())
    plain = logits(model)
    rw.add_adapter(model, rw.LoraConfig(target_modules="all-linear"))
    rw.remove_adapter(model, "default")
    model.save_pretrained(tmp_path)
    assert not any("base_layer" in name for name in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(load_ours(tmp_path)), plain)


def test_only_4_bit_bitsandbytes_configs_are_rewritten():
    stored = theirs("nf4", True, llm_int8_skip_modules=["a"], bnb_4bit_compute_dtype=torch.bfloat16).to_dict()
    expected = Nf4Config(double_quant=True, modules_to_not_convert=["a"], compute_dtype=torch.bfloat16)
    stored["quant_method"] = "bitsandbytes"
    assert rewrite_bitsandbytes_config({"quantization_config": stored}) == expected
    assert rewrite_bitsandbytes_config(stored) == expected
    assert rewrite_bitsandbytes_config({"load_in_4bit": True}) == Fp4Config(compute_dtype="float32")
    assert rewrite_bitsandbytes_config(BitsAndBytesConfig(load_in_8bit=True).to_dict()) is None
    assert rewrite_bitsandbytes_config({"quantization_config": {"quant_method": "gptq"}}) is None
    assert rewrite_bitsandbytes_config({"model_type": "llama"}) is None


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ({"bnb_4bit_quant_type": "int4"}, "RW615"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "RW615"),
        ({"bnb_4bit_compute_dtype": "int8"}, "RW605"),
        ({"bnb_4bit_compute_dtype": "load"}, "RW605"),
        ({"llm_int8_skip_modules": "lm_head"}, "RW615"),
    ],
)
def test_a_nonsense_config_is_refused(setting, code):
    with pytest.raises(QuantizationError, match=code):
        rewrite_bitsandbytes_config({"load_in_4bit": True, **setting})
