"""A 4-bit run merges onto the weights it trained on or onto the original ones, and the difference is measured."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.errors import AdapterError
from rankwise.export.converted import HeldOutRow
from rankwise.export.merged import merge_to_folder
from rankwise.export.verify import REFERENCE, verify_merge
from rankwise.models import load_model, model_facts, resolve_model
from rankwise.quantization import Nf4Config
from rankwise.records import RunRecord
from tiny_models import tiny_gpt2, tiny_llama

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture(params=["llama", "gpt2"])
def run(request, tmp_path):
    """(run folder of a QDoRA adapter, logits as trained), in float32, where rounding hides no difference."""
    base = tiny_llama(hidden_size=64, intermediate_size=128) if request.param == "llama" else tiny_gpt2(n_embd=64)
    base.save_pretrained(tmp_path / "base")
    model, _ = load_model(str(tmp_path / "base"), dtype=torch.float32, quantization=Nf4Config(double_quant=True))
    facts = model_facts(model, resolve_model(str(tmp_path / "base")))
    rw.add_adapter(model, rw.LoraConfig(r=3, use_dora=True, init_lora_weights=False))
    rw.save_adapter(model, tmp_path / "run", base_model=str(tmp_path / "base"))
    RunRecord(method="qdora", seed=0, settings={"model": str(tmp_path / "base")}, base_model=facts).save(
        tmp_path / "run"
    )
    return tmp_path / "run", logits(model)


def test_merged_onto_the_quantized_base_is_what_was_trained(run, tmp_path):
    folder, trained = run
    report = merge_to_folder(folder, tmp_path / "quantized", onto="quantized")
    assert report.onto == "quantized"
    merge_to_folder(folder, tmp_path / "original")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)
    assert getattr(exact.config, "quantization_config", None) is None
    distance = (logits(exact) - trained).abs().max()
    assert distance < 1e-4
    assert distance < (logits(other) - trained).abs().max() / 2


def test_an_adapter_without_a_record_of_four_bits_is_merged_onto_the_original_only(run, tmp_path):
    """As PEFT's."""
    (run[0] / "run.json").unlink()
    with pytest.raises(AdapterError, match=r"RW414: .*--onto original"):
        merge_to_folder(run[0], tmp_path / "merged", onto="quantized")
    assert not (tmp_path / "merged").exists()


def test_merged_onto_the_quantized_the_values_are_those_of_the_dtype_that_trained(tmp_path):
    """Rounding float32 weights to 4 bits gives other values than rounding the bfloat16 ones that a run quantized."""
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    model, _ = load_model(str(tmp_path / "base"), dtype=torch.bfloat16, quantization=Nf4Config(double_quant=True))
    facts = model_facts(model, resolve_model(str(tmp_path / "base")))
    rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["q_proj"]))
    rw.save_adapter(model, tmp_path / "run", base_model=str(tmp_path / "base"))
    name, found = "model.layers.1.mlp.down_proj", {}
    for dtype in ("bfloat16", "float32"):
        settings = {"model": str(tmp_path / "base")}
        RunRecord(method="qlora", seed=0, settings=settings, base_model={**facts, "dtype": dtype}).save(
            tmp_path / "run"
        )
        merge_to_folder(tmp_path / "run", tmp_path / dtype, onto="quantized")
        found[dtype] = load_file(tmp_path / dtype / "model.safetensors")[f"{name}.weight"]
    assert facts["dtype"] == "bfloat16"
    assert torch.equal(found["bfloat16"], model.get_submodule(name).dequantize().float())
    assert not torch.equal(found["bfloat16"], found["float32"])


def test_sixteen_bit_adapters_have_nothing_to_merge_onto(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    rw.add_adapter(model, rw.LoraConfig(r=2))
    rw.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    with pytest.raises(AdapterError, match="RW414"):
        merge_to_folder(tmp_path / "adapter", tmp_path / "merged", onto="quantized")
    assert not (tmp_path / "merged").exists()


def test_verify_measures_every_way(run, tmp_path, monkeypatch):
    folder, _ = run
    monkeypatch.setattr("rankwise.export.verify.text_chunks", lambda tokenizer, text: [IDS])
    result = verify_merge(folder, str(tmp_path / "base"))
    by_name = {variant.name: variant for variant in result.variants}
    assert list(by_name) == [
        REFERENCE,
        "merged onto the original",
        "merged onto the dequantized",
        "onto the dequantized, then 4-bit",
        "onto the original, then 4-bit",
    ]
    assert by_name[REFERENCE].largest_logit_difference == 0
    assert result.closest == "quantized"
    smallest = by_name["merged onto the dequantized"].largest_logit_difference
    assert smallest < by_name["merged onto the original"].largest_logit_difference
    assert smallest < by_name["onto the dequantized, then 4-bit"].largest_logit_difference
    assert all(variant.perplexity > 1 for variant in result.variants)


def test_the_gain_that_is_left_is_measured_on_trained_tokens(run, tmp_path, monkeypatch):
    """The labels are what the trained model answers, so the adapter gains over the base, and rounding costs some."""
    folder, trained = run
    monkeypatch.setattr("rankwise.export.verify.text_chunks", lambda tokenizer, text: [IDS])
    labels = torch.cat([torch.tensor([-100]), trained[0, :-1].argmax(dim=-1)])
    monkeypatch.setattr("rankwise.export.verify.HeldOutRow", lambda ids, _: HeldOutRow(ids, labels))
    result = verify_merge(folder, str(tmp_path / "base"))
    left = {variant.name: variant.gain_left for variant in result.variants}
    assert result.tokens == len(labels) - 1
    assert left[REFERENCE] == 1
    assert left["merged onto the dequantized"] == pytest.approx(1, abs=1e-3)
    assert left["onto the dequantized, then 4-bit"] < left["merged onto the dequantized"]
