"""Merging on disk equals merging in memory, for every adapter and base, sharded or not, tied or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.errors import AdapterError, InputError, ModelError, RunError
from rankwise.export.merged import merge_to_folder
from rankwise.models.prepared import mapped_files
from rankwise.quantization.linear import weights_in_file
from rankwise.records import RunRecord
from tiny_models import tiny_gpt2, tiny_llama

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
CASES = {
    "lora": (tiny_llama, {}),
    "dora": (tiny_llama, {"use_dora": True}),
    "patterns": (tiny_llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "tied_head": (
        lambda: tiny_llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tied_embedding": (
        lambda: tiny_llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
    "adapted_tied_head": (lambda: tiny_llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "q_proj"]}),
    "bias": (lambda: tiny_llama(attention_bias=True), {"target_modules": ["q_proj"], "bias": "all"}),
    "gpt2": (tiny_gpt2, {"use_dora": True}),
    "gpt2_fused": (
        tiny_gpt2,
        {"target_modules": ["c_attn"], "enable_lora": {"c_attn": [True, False, True]}, "use_dora": True},
    ),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def trained(tmp_path, request):
    """(adapter folder, base folder, logits of the adapted model) of one case."""
    make, settings = CASES[request.param]
    model = make()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    rw.add_adapter(model, rw.LoraConfig(**{"r": 3, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for parameter in rw.adapter_parameters(model).values():
            parameter.add_(0.05)
    rw.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    return tmp_path / "adapter", tmp_path / "base", logits(model)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_saved_beside_the_adapter_is_merged_too(tmp_path, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    rw.add_adapter(model, rw.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    rw.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, key: model.get_input_embeddings().weight.detach() + 0.1}, path, {"format": "pt"})
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rw.load_adapter(fresh, tmp_path / "adapter")
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(fresh), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(model), atol=1e-3)


@pytest.mark.parametrize("trained", CASES, indirect=True)
def test_merged_on_disk_computes_what_the_adapted_model_does(trained, tmp_path):
    adapter, _, expected = trained
    merge_to_folder(adapter, tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
def test_only_unfinished_work_of_its_own_goes(trained, tmp_path):
    """The users' folders beside the output stay, whatever their names are like; what a killed merge left goes."""
    users = (".merged.partial", ".merged.partial-mine", ".merged.partial-12345678.bak", ".other.partial-0a1b2c3d")
    for name in (*users, ".merged.partial-0a1b2c3d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".merged.partial-00000000").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    merge_to_folder(trained[0], tmp_path / "merged")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*users, ".merged.partial-00000000", "elsewhere", "adapter", "base", "merged"}
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["onto"] == "original"


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
def test_bad_input(trained, tmp_path):
    adapter, base, _ = trained
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(RunError, match="RW532"):
        merge_to_folder(adapter, tmp_path / "full")
    tiny_gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="RW401"):
        merge_to_folder(adapter, tmp_path / "merged", model=str(tmp_path / "other"))
    with pytest.raises(ModelError):
        merge_to_folder(adapter, tmp_path / "merged", model=str(tmp_path / "nowhere"))
    config = json.loads((base / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ModelError, match="RW309"):
        merge_to_folder(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_the_model_is_copied_only_when_it_is_trusted(trained, trusted, tmp_path):
    adapter, base, _ = trained
    (base / "modeling_own.py").write_text("raise SystemExit", encoding="utf-8")
    merge_to_folder(adapter, tmp_path / "merged", trust_remote_code=trusted)
    assert (tmp_path / "merged" / "modeling_own.py").exists() is trusted


def four_bits(adapter: Path, base: Path) -> None:
    """Let the folder say that the adapter was trained on 4 bits."""
    facts = {"quantization": rw.Nf4Config().to_loading_dict()}
    RunRecord(method="qlora", seed=0, settings={"model": str(base)}, base_model=facts).save(adapter)


def with_nan(W: torch.Tensor) -> torch.Tensor:
    return W.index_fill(0, torch.tensor([3]), float("nan"))


@pytest.mark.parametrize(
    ("change", "onto", "message"),
    [
        (with_nan, "original", "RW323.*NaN or infinity in {}"),
        (with_nan, "quantized", "RW603: {}: .*NaN"),
        (torch.t, "original", r"RW308.*{} is \(48, 32\), expected \(32, 48\)"),
        (torch.t, "quantized", r"RW612: {}: it has shape \(48, 32\)"),
    ],
)
def test_a_broken_base_is_named_and_nothing_is_written(change, message, onto, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    rw.add_adapter(model, rw.LoraConfig(r=3, init_lora_weights=False))
    rw.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    four_bits(tmp_path / "adapter", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path, {"format": "pt"})
    with pytest.raises(InputError, match=message.format(name)):
        merge_to_folder(tmp_path / "adapter", tmp_path / "merged", onto=onto)
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_a_scale_that_leaves_no_number_writes_nothing(onto, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    rw.add_adapter(model, rw.LoraConfig(r=3, lora_alpha=1e30, init_lora_weights=False))
    with torch.no_grad():
        for parameter in rw.adapter_parameters(model).values():
            parameter *= 1e10
    rw.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    four_bits(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(AdapterError, match="merging makes NaN or infinity of") as caught:
        merge_to_folder(tmp_path / "adapter", tmp_path / "merged", onto=onto)
    assert caught.value.code == "RW412"
    assert not list(tmp_path.glob("*merged*"))


def test_merged_weights_are_views_of_a_file(tmp_path):
    """So that a process holds one of them at a time."""
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=3, init_lora_weights=False))
    expected = logits(model)
    with weights_in_file(tmp_path / "weights"):
        rw.merge_adapter(model, reversible=False)
        found = mapped_files(model)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert found.bytes == sum(layer.weight.nbytes for layer in layers if layer is not model.lm_head)
    assert not (tmp_path / "weights").exists()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
