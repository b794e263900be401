"""An adapter trained over a checkpoint that is 4-bit on disk merges into the values that checkpoint stands for."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.errors import ModelError, RankwiseWarning
from rankwise.export.merged import merge_to_folder
from rankwise.export.verify import REFERENCE, REQUANTIZED_AGAIN, verify_merge
from rankwise.models import load_model, model_facts, resolve_model
from rankwise.quantization import Fp4Config, Nf4Config, quantize
from rankwise.records import RunRecord
from tiny_models import tiny_gpt2, tiny_llama

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
CASES = {
    "llama": (lambda: tiny_llama(hidden_size=64, intermediate_size=128), Nf4Config(double_quant=True)),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), Fp4Config(block_size=128)),
    "gpt2": (lambda: tiny_gpt2(n_embd=64), Nf4Config()),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture(params=CASES)
def run(request, tmp_path):
    """(run folder of a QDoRA adapter over a 4-bit folder in several shards, logits as trained)."""
    make, config = CASES[request.param]
    dense = make()
    quantize(dense, config)
    dense.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model, _ = load_model(str(tmp_path / "base"), dtype=torch.float32)
    facts = model_facts(model, resolve_model(str(tmp_path / "base")))
    rw.add_adapter(model, rw.LoraConfig(r=3, use_dora=True, init_lora_weights=False))
    rw.save_adapter(model, tmp_path / "run", base_model=str(tmp_path / "base"))
    RunRecord(method="qdora", seed=0, settings={"model": str(tmp_path / "base")}, base_model=facts).save(
        tmp_path / "run"
    )
    return tmp_path / "run", logits(model)


@pytest.mark.parametrize("with_record", [True, False])
def test_merged_it_computes_what_was_trained(with_record, run, tmp_path):
    folder, trained = run
    if not with_record:
        (folder / "run.json").unlink()
    report = merge_to_folder(folder, tmp_path / "merged", onto="quantized")
    assert report.onto == "quantized"
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)


def test_the_original_weights_are_not_there(run, tmp_path):
    with pytest.raises(ModelError, match=r"RW309.*--onto quantized"):
        merge_to_folder(run[0], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_weights_quantized_in_another_way_are_refused(run, tmp_path):
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"RW309.*gptq"):
        merge_to_folder(run[0], tmp_path / "merged")
    # The description lacks the number of bits, so that nothing can load the dequantized values either.
    with pytest.raises(ModelError, match="RW316"):
        merge_to_folder(run[0], tmp_path / "merged", onto="quantized")
    assert not list(tmp_path.glob("*merged*"))


def test_verify_has_no_original_to_measure(run, tmp_path, monkeypatch):
    monkeypatch.setattr("rankwise.export.verify.text_chunks", lambda tokenizer, text: [IDS])
    result = verify_merge(run[0])
    assert [variant.name for variant in result.variants] == [
        REFERENCE,
        "merged onto the dequantized",
        REQUANTIZED_AGAIN,
    ]
    assert result.closest == "quantized"
    assert result.variants[1].largest_logit_difference < 1e-3


def test_another_base_than_trained_on_is_said(run, tmp_path):
    folder, _ = run
    record = json.loads((folder / "run.json").read_text())
    record["base_model"]["sha256"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.warns(RankwiseWarning, match=r"RW415.*000000000000"):
        merge_to_folder(folder, tmp_path / "merged", onto="quantized")
