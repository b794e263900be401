"""Adapters over mixtures of experts merge onto the originals and onto what their 4-bit experts stand for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.errors import ModelError
from rankwise.export.merged import merge_to_folder
from rankwise.models import load_model, model_facts, resolve_model
from rankwise.quantization import Nf4Config, quantize
from rankwise.records import RunRecord
from tables import thinned
from tiny_models import tiny_moe

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss")
CONFIG = Nf4Config(block_size=32, double_quant=True)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


DORA = rw.LoraConfig(r=3, use_dora=True, init_lora_weights=False)


def train(base, run, *, quantization=None, config=DORA) -> torch.Tensor:
    """An adapter over the folder ``base`` in ``run``; logits of the adapted model."""
    model, _ = load_model(str(base), dtype=torch.float32, quantization=quantization)
    facts = model_facts(model, resolve_model(str(base)))
    rw.add_adapter(model, config)
    rw.save_adapter(model, run, base_model=str(base))
    RunRecord(method="qdora", seed=0, settings={"model": str(base), "dtype": "float32"}, base_model=facts).save(run)
    return logits(model)


def merged(run, output, onto) -> nn.Module:
    report = merge_to_folder(run, output, onto=onto)
    assert report.onto == onto
    model, info = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    return model


@thinned({"family": FAMILIES, "stacked": [False, True]})
def test_merged_onto_the_quantized_it_computes_what_was_trained(family, stacked, tmp_path):
    """The base keeps each expert apart, as the family's checkpoints do, or the stacks as the model has them."""
    model = tiny_moe(family)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB", save_original_format=not stacked)
    trained = train(tmp_path / "base", tmp_path / "run", quantization=CONFIG)
    found = merged(tmp_path / "run", tmp_path / "merged", "quantized")
    torch.testing.assert_close(logits(found), trained, rtol=1e-4, atol=1e-5)
    names = [
        set().union(*(load_file(file) for file in (tmp_path / folder).glob("*.safetensors")))
        for folder in ("base", "merged")
    ]
    assert stacked or names[0] == names[1]
    onto_original = merged(tmp_path / "run", tmp_path / "other", "original")
    assert not torch.allclose(logits(onto_original), trained, atol=1e-3)


FUSED = {
    # q, k and v in one tensor, gate and up in another for a layer without experts, beside the experts' own.
    "sarvam_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "hrm_text": {"intermediate_size": 48, "num_hidden_layers": 2, "H_cycles": 1, "L_cycles": 1},
}


@pytest.mark.parametrize("onto", ["original", "quantized"])
@pytest.mark.parametrize("family", FUSED)
def test_layers_that_the_files_hold_fused(family, onto, tmp_path):
    tiny_moe(family, **FUSED[family]).save_pretrained(tmp_path / "base")
    quantization = CONFIG if onto == "quantized" else None
    trained = train(tmp_path / "base", tmp_path / "run", quantization=quantization)
    torch.testing.assert_close(
        logits(merged(tmp_path / "run", tmp_path / "merged", onto)), trained, rtol=1e-4, atol=1e-4
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert {name: tensor.shape for name, tensor in before.items()} == {name: W.shape for name, W in after.items()}
    assert any("qkv_proj" in name or "query_key_value" in name for name in after)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_that_is_4_bit_on_disk(family, tmp_path):
    dense = tiny_moe(family)
    quantize(dense, CONFIG)
    dense.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    trained = train(tmp_path / "base", tmp_path / "run")
    found = merged(tmp_path / "run", tmp_path / "merged", "quantized")
    torch.testing.assert_close(logits(found), trained, rtol=1e-4, atol=1e-5)


ON_EXPERTS = rw.LoraConfig(
    r=3,
    lora_alpha=3,
    target_modules=["q_proj", "lm_head"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    rank_pattern={"down_proj": 2},
    init_lora_weights=False,
)


@thinned({"family": ["mixtral", "qwen3_moe", "gpt_oss"], "stacked": [False, True]})
def test_adapters_on_the_experts_themselves(family, stacked, tmp_path):
    """Onto the original, and onto what 4-bit training saw; gate and up have one matrix of rank r, and two tensors."""
    model = tiny_moe(family)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB", save_original_format=not stacked)
    for quantization, onto in ((None, "original"), (CONFIG, "quantized")):
        run = tmp_path / f"run-{onto}"
        trained = train(tmp_path / "base", run, quantization=quantization, config=ON_EXPERTS)
        found = merged(run, tmp_path / onto, onto)
        torch.testing.assert_close(logits(found), trained, rtol=1e-4, atol=1e-5)
    onto_original = merged(run, tmp_path / "other", "original")
    assert not torch.allclose(logits(onto_original), trained, atol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_adapters_on_experts_that_are_4_bit_on_disk(family, tmp_path):
    dense = tiny_moe(family)
    quantize(dense, CONFIG)
    dense.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    trained = train(tmp_path / "base", tmp_path / "run", config=ON_EXPERTS)
    found = merged(tmp_path / "run", tmp_path / "merged", "quantized")
    torch.testing.assert_close(logits(found), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", ["layers.1.block_sparse_moe.experts", "layers.1.block_sparse_moe.experts.3"])
def test_a_base_without_its_experts(missing, tmp_path):
    tiny_moe("mixtral").save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "run", config=ON_EXPERTS)
    path = tmp_path / "base" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if missing not in k}, path)
    with pytest.raises(ModelError, match=r"RW308.*model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        merge_to_folder(tmp_path / "run", tmp_path / "merged")
